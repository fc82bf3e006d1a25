"""TensorRT's modules are tried in order, and its log is kept without noise."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path

import pytest

from sbtk_runtime.engines.tensorrt.library import (
    MODULES,
    LogLines,
    find_tensorrt,
    join_lines,
    recording_logger,
)
from sbtk_runtime.errors import BadConfig, EngineUnavailable, MissingExtra

_OLD = "__version__ = {version!r}\nclass Builder: pass\nclass ICudaEngine: pass\n"
_WORKING = _OLD + "ICudaEngine.create_runtime_config = None\n"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose Python files are the only TensorRT modules that can be imported."""
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        # Deleted again afterwards, so that no other test sees what a test here installs.
        monkeypatch.setitem(sys.modules, name, sys)
        monkeypatch.delitem(sys.modules, name)
    others = [entry for entry in sys.path if not list(Path(entry or ".").glob("tensorrt*"))]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    return tmp_path


def _write(folder: Path, name: str, version: str) -> None:
    (folder / f"{name}.py").write_text(_WORKING.format(version=version))
    # Python remembers a folder's names for as long as its time stamp stays the same.
    importlib.invalidate_caches()


def test_the_real_library_is_found_by_either_name() -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed")
    found = find_tensorrt("tensorrt_rtx")
    assert found == find_tensorrt("tensorrt-rtx")
    assert found.version == found.module.__version__
    assert found.title == f"TensorRT-RTX {found.version}"
    assert not found.needs_a_driver_to_build


def test_tensorrt_comes_before_tensorrt_rtx(installed: Path) -> None:
    _write(installed, "tensorrt_rtx", "1.7.1.116")
    assert find_tensorrt().name == "tensorrt_rtx"
    _write(installed, "tensorrt", "11.4.0.106")
    found = find_tensorrt()
    assert (found.name, found.version, found.major) == ("tensorrt", "11.4.0.106", 11)
    assert found.needs_a_driver_to_build
    assert find_tensorrt("tensorrt_rtx").name == "tensorrt_rtx"


def test_a_missing_library_is_named_with_its_extra(installed: Path) -> None:
    with pytest.raises(MissingExtra, match="TensorRT is not installed") as caught:
        find_tensorrt("tensorrt")
    assert caught.value.next_step == 'pip install "sbtk[tensorrt]"'
    with pytest.raises(MissingExtra, match="TensorRT-RTX is not installed") as caught:
        find_tensorrt("tensorrt-rtx")
    assert caught.value.next_step == 'pip install "sbtk[tensorrt-rtx]"'
    with pytest.raises(MissingExtra, match="neither") as caught:
        find_tensorrt()
    assert "sbtk[tensorrt]" in caught.value.next_step
    assert "sbtk[tensorrt-rtx]" in caught.value.next_step


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise OSError('libnvinfer.so.11: cannot open')", "cannot be loaded: libnvinfer.so.11"),
        ("import tensorrt_bindings_of_nobody", "cannot be loaded: No module named"),
        ("raise RuntimeError()", "cannot be loaded: RuntimeError"),
        ("", "not completely installed"),
        (_WORKING.format(version="8.6.1"), r"8\.6\.1 is too old"),
        (_OLD.format(version="10.2.0"), r"10\.2\.0 is too old\s+expected: 10\.14"),
    ],
)
def test_a_library_that_does_not_load_is_not_a_missing_extra(
    installed: Path, source: str, why: str
) -> None:
    (installed / "tensorrt.py").write_text(source)
    with pytest.raises(EngineUnavailable, match=why):
        find_tensorrt("tensorrt")
    with pytest.raises(EngineUnavailable, match=why):
        find_tensorrt()
    # A broken one does not hide a working one.
    _write(installed, "tensorrt_rtx", "1.7.1.116")
    assert find_tensorrt().name == "tensorrt_rtx"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(BadConfig, match="unknown TensorRT 'tensorrt-lean'"):
        find_tensorrt("tensorrt-lean")


def test_errors_are_kept_once_and_without_noise() -> None:
    log = LogLines()
    log.add("WARNING", "WARNING The logger passed into createInferBuilder differs from one ...")
    log.add("INFO", "Opset version: 20")
    log.add("VERBOSE", "much")
    assert log.problems() == []
    log.add("WARNING", "onnxOpImporters.cpp:1988: For zero_point with type int32 ...")
    assert log.problems() == ["For zero_point with type int32 ..."]
    for _ in range(2):
        log.add("ERROR", "[a/b.cpp::f::12] Error Code 2: bad (no. In f at /_src/a.cpp:12)")
    log.add("INTERNAL_ERROR", "ModelImporter.cpp:1: first\n--- Begin node ---\nsecond")
    # With errors there, warnings only distract.
    assert log.problems() == ["Error Code 2: bad (no.)", "first", "second"]
    assert ("INFO", "Opset version: 20") in log.lines()
    assert not any(kind == "VERBOSE" for kind, _ in log.lines())


def test_only_the_last_lines_are_shown() -> None:
    assert join_lines([]) == " no reason given"
    assert join_lines(["one", "two"]) == "\n    one\n    two"
    shown = join_lines([str(number) for number in range(9)], most=2)
    assert shown == "\n    (7 lines before)\n    7\n    8"


def test_any_thread_may_log() -> None:
    log = LogLines()

    def say(who: int) -> None:
        for number in range(200):
            log.add("ERROR", f"{who} {number}")

    threads = [threading.Thread(target=say, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.problems()) == 1600
    for number in range(5000):
        log.add("INFO", str(number))
    assert len(log.lines()) == 2000


def test_the_real_library_uses_the_logger(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed")
    trt = find_tensorrt("tensorrt_rtx")
    first, second = recording_logger(trt), recording_logger(trt)
    builders = [trt.module.Builder(logger) for logger in (first, second)]
    network = builders[1].create_network(0)
    assert not trt.module.OnnxParser(network, second).parse(b"no ONNX")
    # Each keeps its own lines, and nothing is printed.
    assert first.problems() == []
    assert any("Failed to parse the ONNX model" in line for line in second.problems())
    assert capfd.readouterr() == ("", "")
