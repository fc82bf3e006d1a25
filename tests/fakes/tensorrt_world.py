"""What the objects of one fake TensorRT share: its GPUs, its names and its faults.

A version of TensorRT has certain names; its objects refuse every other name.
"""

from __future__ import annotations

import ast
import enum
import hashlib
import json
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# The real one: later the name may stand for the fake.
import tensorrt_rtx as _REAL_RTX

from tests.fakes.gpu import FakeGpus

PLAN_MAGIC = b"fake plan "

_LISTS = Path(__file__).parents[1] / "runtime"


@dataclass(frozen=True)
class Surface:
    """The names that one version of one module has.

    The lists of TensorRT have the classes that the versions differ in. The rest, such as the
    logger and the network, are held to the real TensorRT-RTX, which this machine has.
    """

    module: str
    version: str

    @property
    def names(self) -> frozenset[str]:
        """Return the names in the module itself."""
        if self.module == "tensorrt_rtx":
            return _public(_REAL_RTX)
        return frozenset(_listed(self.version)[""])

    def members(self, class_name: str) -> tuple[str, ...]:
        """Return the names of a class, those of an enumeration in its order."""
        listed = {} if self.module == "tensorrt_rtx" else _listed(self.version)
        if class_name in listed:
            return listed[class_name]
        real = getattr(_REAL_RTX, class_name)
        return tuple(getattr(real, "__members__", None) or sorted(_public(real)))

    def enumeration(self, class_name: str) -> type[enum.Enum]:
        """Return an enumeration like those of the bindings: no number, but made into one."""
        members = {name: number for number, name in enumerate(self.members(class_name))}
        kind: Any = _Numbered
        return kind(class_name, members)  # type: ignore[no-any-return]


class _Numbered(enum.Enum):
    def __int__(self) -> int:
        return int(self.value)


class Refusing:
    """An object of TensorRT: a public name that its class does not list is an `AttributeError`.

    A class attribute that is no function is a property that may be set; a listed name that the
    class does not define is one that the fake lacks, an `AssertionError`.
    """

    _surface: Surface
    _class_name = ""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            self._require(name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self._require(name)
            assert not callable(getattr(type(self), name)), f"{name} is a method"
        super().__setattr__(name, value)

    @classmethod
    def _require(cls, name: str) -> None:
        class_name = cls._class_name or cls.__name__
        if name not in cls._surface.members(class_name):
            raise AttributeError(
                f"{class_name} of {cls._surface.module} {cls._surface.version} has no {name!r}"
            )
        assert hasattr(cls, name), f"the fake's {class_name} has no {name}"


@dataclass
class TensorRtFaults:
    """What goes wrong; a text is the log line that comes with it, empty is nothing.

    Attributes:
        build: `build_serialized_network` gives None.
        deserialise: `deserialize_cuda_engine` gives None.
        context: `create_execution_context` gives None.
        execute: `execute_async_v3` gives False, outside of captures.
        execute_from_batch: `execute` is only for batches from here on.
        capture: `execute_async_v3` gives False in captures.
        output_dim: that `get_tensor_shape` tells; 0 for the right one.
    """

    build: str = ""
    deserialise: str = ""
    context: str = ""
    execute: str = ""
    execute_from_batch: int = 0
    capture: str = ""
    output_dim: int = 0


@dataclass
class TensorRtWorld:
    """What the objects of one fake module share.

    Attributes:
        gpus: where they run.
        surface: which names they have.
        faults: what goes wrong.
        scratch_per_image: bytes of context memory that an image needs.
        context_bytes: that TensorRT itself takes from the GPU for each context.
        alive: its objects that exist, by class.
        made: its objects that ever existed, by class.
        runs: of the network, by batch: those outside of captures.
        module: the module itself.
    """

    gpus: FakeGpus
    surface: Surface
    faults: TensorRtFaults = field(default_factory=TensorRtFaults)
    compute_capability: str = "9.0"
    scratch_per_image: int = 1024
    context_bytes: int = 4096
    alive: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    runs: Counter[int] = field(default_factory=Counter)
    module: Any = None

    def log(self, logger: Any, text: str, severity: str = "ERROR") -> None:
        logger.log(getattr(self.module.ILogger.Severity, severity), text)

    def count(self, thing: Any, name: str, reserved: tuple[int, int] = (0, 0)) -> None:
        """Count an object as long as it lives; `reserved` is GPU and bytes that it holds."""
        self.alive[name] += 1
        self.made[name] += 1

        def end() -> None:
            self.alive[name] -= 1
            self.gpus.unreserve(*reserved)

        # Without atexit, since nothing then needs to be counted.
        weakref.finalize(thing, end).atexit = False

    def plan(self, onnx: bytes, profile: Mapping[str, Sequence[tuple[int, ...]]]) -> bytes:
        head = {
            "module": self.surface.module,
            "version": self.surface.version,
            "compute_capability": self.compute_capability,
            "profile": profile,
            "sha256": hashlib.sha256(onnx).hexdigest(),
        }
        return PLAN_MAGIC + json.dumps(head).encode() + b"\n" + onnx


class Fake(Refusing):
    """An object of one world."""

    _world: TensorRtWorld


class Dims:
    """Sizes of a tensor; a sequence, but no tuple."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._sizes = tuple(sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> int:
        return self._sizes[index]


def initialised(thing: Any) -> Any:
    """Return a logger or monitor after a look at whether its base's `__init__` was called."""
    assert getattr(thing, "_is_initialised", False), "the base's __init__ was not called"
    return thing


@cache
def _listed(version: str) -> dict[str, tuple[str, ...]]:
    """Return the names by class, in their order; the module's own are those of ''."""
    listed: dict[str, tuple[str, ...]] = {}
    for line in (_LISTS / f"tensorrt_api_{version}.txt").read_text().splitlines():
        name, _, names = line.partition("[")
        if names:
            listed[name.strip()] = tuple(ast.literal_eval("[" + names))
    assert len(listed) > 20
    return listed


def _public(thing: Any) -> frozenset[str]:
    return frozenset(name for name in dir(thing) if not name.startswith("_"))
