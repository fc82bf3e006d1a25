"""Find TensorRT or TensorRT for RTX, and keep their log lines for error messages."""

from __future__ import annotations

import importlib
import re
import threading
from collections import deque
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sbtk_runtime.errors import BadConfig, EngineUnavailable, MissingExtra, SbtkError

#: Modules, in the order in which they are tried.
MODULES = ("tensorrt", "tensorrt_rtx")

_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}

# TensorRT 10 is the first with strongly typed networks, whose precision is that of the graph.
_OLDEST_MAJOR = {"tensorrt": 10, "tensorrt_rtx": 1}
_OLDEST = {"tensorrt": "10.14", "tensorrt_rtx": "1.2"}

_MAX_LINES = 2000
_PROBLEMS = frozenset({"INTERNAL_ERROR", "ERROR", "WARNING"})
_NOISE = re.compile(
    # Each build has its own logger, so that its lines stay apart.
    r"The logger passed into \w+ differs"
    # What the parser prints around the line with the reason.
    r"|--- (Begin|End) node ---|In function \w+:$|^Node name: $"
    # Without a GPU, this follows every failure.
    r"|catchCudaError.*cudaError 35"
)
_SOURCE_LOCATIONS = (
    # [codeGenerator.cpp::createMyelinGraph::1203], and ModelImporter.cpp:151:
    re.compile(r"^(WARNING |ERROR: )?(\[[\w./]+\.(cpp|h|hpp)::\w+::\d+\] |[\w./]+\.(cpp|h):\d+: )"),
    # In checkType at /_src/optimizer/common/nodeBase.cpp:456
    re.compile(r"\s*In [\w:()]+(\(\))? at [\w./]+\.(cpp|h|hpp):\d+"),
)


@dataclass(frozen=True)
class TensorRt:
    """An installed TensorRT.

    Attributes:
        name: `tensorrt` or `tensorrt_rtx`.
        module: the imported module of that name.
        version: as the module reports it, such as `10.16.1.11`.
    """

    name: str
    module: Any
    version: str

    @property
    def title(self) -> str:
        """Its name and version for people."""
        return f"{_TITLES[self.name]} {self.version}"

    @property
    def major(self) -> int:
        """The first number of the version."""
        return _major(self.version)

    @property
    def needs_a_driver_to_build(self) -> bool:
        """Whether building a plan requires a GPU; TensorRT times kernels, TensorRT-RTX does not."""
        return self.name == "tensorrt"


def find_tensorrt(name: str | None = None) -> TensorRt:
    """Return the TensorRT of that name, or else the first of `MODULES` that loads.

    Args:
        name: one of `MODULES`; hyphens are read as underscores.

    Raises:
        BadConfig: there is no TensorRT of that name.
        MissingExtra: it is not installed.
        EngineUnavailable: it is installed but cannot be loaded, or is too old.
    """
    if name is not None:
        module_name = name.replace("-", "_")
        if module_name not in MODULES:
            raise BadConfig(f"unknown TensorRT {name!r}", " or ".join(MODULES))
        return _load(module_name)
    problems: list[SbtkError] = []
    for module_name in MODULES:
        try:
            return _load(module_name)
        except (MissingExtra, EngineUnavailable) as problem:
            problems.append(problem)
    broken = [problem for problem in problems if isinstance(problem, EngineUnavailable)]
    if broken:
        raise broken[0]
    raise MissingExtra(
        "neither TensorRT nor TensorRT-RTX is installed",
        "the extra 'tensorrt' or 'tensorrt-rtx'",
        " or ".join(_install(module_name) for module_name in MODULES),
    )


class LogLines:
    """The log of one TensorRT object, in memory; any thread may add to it.

    Keeps the last 2,000 lines, without verbose ones.
    """

    def __init__(self) -> None:
        self._lines: deque[tuple[str, str]] = deque(maxlen=_MAX_LINES)
        self._lock = threading.Lock()

    def add(self, severity: str, text: str) -> None:
        """Keep a line of that severity, such as `ERROR`, unless it is `VERBOSE`."""
        if severity == "VERBOSE":
            return
        with self._lock:
            self._lines.append((severity, text))

    def lines(self) -> list[tuple[str, str]]:
        """Return severity and text of every line, oldest first."""
        with self._lock:
            return list(self._lines)

    def problems(self) -> list[str]:
        """Return the errors, or the warnings if there are none, without C++ paths and repeats."""
        lines = [(kind, text) for kind, text in self.lines() if kind in _PROBLEMS]
        has_errors = any(kind != "WARNING" for kind, _ in lines)
        wanted = [text for kind, text in lines if kind != "WARNING" or not has_errors]
        return _without_noise(wanted)


def recording_logger(trt: TensorRt) -> Any:
    """Return a new logger for TensorRT objects that prints nothing and keeps its lines.

    It has the methods `lines()` and `problems()` of `LogLines`. It lives as long as the process:
    TensorRT keeps a pointer to the first logger that it gets and uses it for all later objects.
    """
    base: Any = trt.module.ILogger

    class RecordingLogger(base):  # type: ignore[misc]  # its base is known only at run time
        """Forwards every line of TensorRT to `LogLines`."""

        def __init__(self) -> None:
            # The bindings crash with super(): the class must be named.
            base.__init__(self)
            self._log = LogLines()
            self.lines, self.problems = self._log.lines, self._log.problems

        def log(self, severity: Any, msg: str) -> None:
            """Keep a line; called by TensorRT, from any thread."""
            self._log.add(severity.name, msg)

    logger = RecordingLogger()
    _loggers_alive.append(logger)
    return logger


def join_lines(problems: list[str], most: int = 6) -> str:
    """Return log lines as text for the end of an error message.

    Args:
        problems: from `LogLines.problems`.
        most: number of lines to show, from the end.
    """
    if not problems:
        return " no reason given"
    shown = problems[-most:]
    left_out = len(problems) - len(shown)
    before = [f"({left_out} lines before)"] if left_out else []
    return "".join(f"\n    {line}" for line in [*before, *shown])


_loggers_alive: list[Any] = []


def _load(name: str) -> TensorRt:
    module = _import(name)
    version = str(getattr(module, "__version__", ""))
    if not hasattr(module, "Builder") or not version:
        raise EngineUnavailable(
            f"{_TITLES[name]} is not completely installed: the module {name} has no Builder",
            "a complete installation",
            _install(name),
        )
    # The newest call that sbtk uses; TensorRT's documentation does not name the 10.x that added it.
    has_calls = hasattr(getattr(module, "ICudaEngine", None), "create_runtime_config")
    if _major(version) < _OLDEST_MAJOR[name] or not has_calls:
        raise EngineUnavailable(
            f"{_TITLES[name]} {version} is too old",
            f"{_OLDEST[name]} or newer, whose networks have the precision of the ONNX file",
            _install(name),
        )
    return TensorRt(name, module, version)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name == name:
            raise MissingExtra(
                f"{_TITLES[name]} is not installed", f"the extra {_EXTRAS[name]!r}", _install(name)
            ) from problem
        raise _does_not_load(name, problem) from problem
    # A missing or incompatible library can raise any exception.
    except Exception as problem:
        raise _does_not_load(name, problem) from problem


def _does_not_load(name: str, problem: Exception) -> EngineUnavailable:
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return EngineUnavailable(
        f"{_TITLES[name]} is installed but cannot be loaded: {lines[0][:300]}",
        "its own libraries and CUDA's",
        _install(name),
    )


def _install(name: str) -> str:
    return f'pip install "sbtk[{_EXTRAS[name]}]"'


def _major(version: str) -> int:
    digits = re.match(r"\d+", version)
    return int(digits.group()) if digits else 0


def _without_noise(texts: list[str]) -> list[str]:
    kept: dict[str, None] = {}
    for text in texts:
        for line in text.splitlines():
            if _NOISE.search(line):
                continue
            for pattern in _SOURCE_LOCATIONS:
                line = pattern.sub("", line)
            if line.strip():
                kept[line.strip()] = None
    return list(kept)
