"""A plan comes from the cache or is built, and is never stored incompletely."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.cuda import CudaDevice
from sbtk_runtime.engines.tensorrt.build import BuildProgress, BuildSettings
from sbtk_runtime.engines.tensorrt.cache import PlanCache, cache_folder
from sbtk_runtime.engines.tensorrt.engine import ready_plan
from sbtk_runtime.engines.tensorrt.library import TensorRt, find_tensorrt
from sbtk_runtime.errors import BadModel, EngineUnavailable
from tests.tiny import tiny_bundle, write_tiny_manifest
from tests.tiny_conv import tiny_conv_model

ROOT = Path(__file__).parents[4]
SMALL = BuildSettings(1, 2, 4)
ADA = CudaDevice(0, "NVIDIA GeForce RTX 4090", "8.9", 24 << 30, "13.2")
HOPPER = CudaDevice(1, "NVIDIA H100 80GB HBM3", "9.0", 80 << 30, "13.2")


@pytest.fixture(scope="module")
def rtx() -> TensorRt:
    pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed")
    return find_tensorrt("tensorrt_rtx")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tiny_bundle(tmp_path_factory.mktemp("tiny"))
    (folder / "model.fp16.onnx").write_bytes(tiny_conv_model("fp16").SerializeToString())
    (folder / "model.int8.trt.onnx").write_bytes(
        tiny_conv_model("int8 for TensorRT").SerializeToString()
    )
    write_tiny_manifest(folder)
    return Bundle.open(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, `$XDG_CACHE_HOME`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_plan_is_built_once(rtx: TensorRt, bundle: Bundle, home: Path) -> None:
    notices: list[str] = []
    first = ready_plan(bundle, "fp16", rtx, None, SMALL, notify=notices.append)
    assert first.is_new
    assert first.kept_in is not None
    assert first.kept_in.is_relative_to(home / "sbtk" / "plans")
    assert first.kept_in.read_bytes() == first.plan
    # Built without a GPU, for any.
    assert (first.record.device, first.record.compute_capability) == ("none", "")
    assert (first.record.module, first.record.version) == ("tensorrt_rtx", rtx.version)
    assert first.record.onnx_sha256 == bundle.manifest.files["model.fp16.onnx"].sha256
    assert first.record.model_id == bundle.manifest.model_id
    assert first.record.settings == SMALL
    assert any("building the fp16 plan" in sentence for sentence in notices)
    assert any(str(first.kept_in) in sentence for sentence in notices)
    notices.clear()
    for settings in (SMALL, None):
        again = ready_plan(
            bundle, "fp16", rtx, None, settings, may_build=False, notify=notices.append
        )
        assert not again.is_new
        assert (again.plan, again.record, again.kept_in) == (
            first.plan,
            first.record,
            first.kept_in,
        )
    assert notices == []


def test_every_precision_has_its_own_plan(rtx: TensorRt, bundle: Bundle, home: Path) -> None:
    plans = {
        precision: ready_plan(bundle, precision, rtx, None, SMALL)
        for precision in ("fp32", "fp16", "int8")
    }
    assert {plan.record.precision for plan in plans.values()} == set(plans)
    assert len({plan.record.onnx_sha256 for plan in plans.values()}) == 3
    int8_file = bundle.manifest.files["model.int8.trt.onnx"]
    assert plans["int8"].record.onnx_sha256 == int8_file.sha256
    assert len(PlanCache(cache_folder()).entries()) == 3


def test_other_settings_give_another_plan(rtx: TensorRt, bundle: Bundle, home: Path) -> None:
    ready_plan(bundle, "fp16", rtx, None, SMALL)
    assert ready_plan(bundle, "fp16", rtx, None, BuildSettings(1, 8, 16)).is_new
    for batch, largest in ((1, 4), (5, 16), (500, 16)):
        plan = ready_plan(bundle, "fp16", rtx, None, may_build=False, batch=batch)
        assert plan.record.batch_max == largest


def test_a_plan_belongs_to_the_gpu_it_was_built_on(
    rtx: TensorRt, bundle: Bundle, home: Path
) -> None:
    # A plan that was built on this GPU, which is only pretended: no call of CUDA can be made.
    ready = ready_plan(bundle, "fp16", rtx, None, SMALL)
    PlanCache(cache_folder()).clear()
    record = replace(ready.record, device=ADA.name, compute_capability=ADA.compute_capability)
    PlanCache(cache_folder()).store(record, ready.plan)
    assert ready_plan(bundle, "fp16", rtx, ADA, may_build=False).record == record
    with pytest.raises(EngineUnavailable, match=r"no plan yet.*built on NVIDIA GeForce RTX 4090"):
        ready_plan(bundle, "fp16", rtx, HOPPER, may_build=False)


def test_without_a_plan_the_next_step_is_to_build_one(
    rtx: TensorRt, bundle: Bundle, home: Path
) -> None:
    with pytest.raises(EngineUnavailable, match="no plan yet of tiny@") as caught:
        ready_plan(bundle, "fp16", rtx, None, may_build=False)
    command = f"sbtk engine build {bundle.folder} --precision fp16 --module tensorrt_rtx"
    assert caught.value.next_step == command
    with pytest.raises(EngineUnavailable) as caught:
        ready_plan(bundle, "fp16", rtx, HOPPER, may_build=False)
    assert caught.value.next_step == f"{command} --device cuda:1"


def test_a_damaged_plan_is_rebuilt_with_a_notice(rtx: TensorRt, bundle: Bundle, home: Path) -> None:
    first = ready_plan(bundle, "fp16", rtx, None, SMALL)
    assert first.kept_in is not None
    content = bytearray(first.plan)
    content[len(content) // 2] ^= 1
    first.kept_in.write_bytes(content)
    with pytest.raises(EngineUnavailable, match="damaged or was changed"):
        ready_plan(bundle, "fp16", rtx, None, may_build=False)
    notices: list[str] = []
    again = ready_plan(bundle, "fp16", rtx, None, SMALL, notify=notices.append)
    assert again.is_new
    assert "damaged or was changed" in notices[0]
    assert not ready_plan(bundle, "fp16", rtx, None, may_build=False).is_new


@pytest.mark.parametrize("obstacle", ["file", "link", "open"])
def test_an_unusable_cache_does_not_prevent_a_build(
    rtx: TensorRt,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    obstacle: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if obstacle == "file":
        (tmp_path / "cache").write_bytes(b"")
    elif obstacle == "link":
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "sbtk").symlink_to(elsewhere)
    else:
        cache_folder().chmod(0o777)
    notices: list[str] = []
    ready = ready_plan(bundle, "fp16", rtx, None, SMALL, notify=notices.append)
    assert ready.is_new
    assert ready.plan
    assert ready.kept_in is None
    assert any("is not kept, and will be built again" in sentence for sentence in notices)
    assert not list(elsewhere.iterdir())
    with pytest.raises(EngineUnavailable, match=r"no plan yet.*\(.*cache"):
        ready_plan(bundle, "fp16", rtx, None, may_build=False)


def test_a_plan_that_cannot_be_stored_is_still_used(
    rtx: TensorRt, bundle: Bundle, home: Path
) -> None:
    notices: list[str] = []
    cache_folder()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 1 MB, which only one of the plans does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        ready = ready_plan(bundle, "fp32", rtx, None, SMALL, notify=notices.append)
        fp16 = ready_plan(bundle, "fp16", rtx, None, SMALL, notify=notices.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ready.kept_in is not None
    assert len(fp16.plan) > 1 << 20
    assert (fp16.is_new, fp16.kept_in) == (True, None)
    assert "is not kept" in notices[-1]
    assert [entry.record for entry in PlanCache(cache_folder()).entries()] == [ready.record]


def test_a_bundle_without_the_file_for_tensorrt_says_how_to_make_it(
    rtx: TensorRt, home: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(tiny_bundle(tmp_path / "tiny"))
    with pytest.raises(BadModel, match="no int8 model for TensorRT") as caught:
        ready_plan(bundle, "int8", rtx, None)
    assert "--int8-trt" in caught.value.next_step


def test_no_plan_is_built_from_a_damaged_onnx_file(
    rtx: TensorRt, home: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(tiny_bundle(tmp_path / "tiny"))
    path = bundle.onnx_path("fp32")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadModel, match="damaged"):
        ready_plan(bundle, "fp32", rtx, None)
    assert PlanCache(cache_folder()).entries() == []


def test_tensorrt_without_a_driver_is_refused_before_it_is_used(bundle: Bundle, home: Path) -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver")
    untouchable = TensorRt("tensorrt", object(), "10.16.1.11")
    with pytest.raises(EngineUnavailable, match="no NVIDIA driver"):
        ready_plan(bundle, "fp16", untouchable, None, may_build=True)


_READY = """
import os, signal, sys
from pathlib import Path
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.tensorrt.build import BuildSettings
from sbtk_runtime.engines.tensorrt.engine import ready_plan
from sbtk_runtime.engines.tensorrt.library import find_tensorrt

def progress(state):
    if {is_killed}:
        os.kill(os.getpid(), signal.SIGKILL)

trt, bundle = find_tensorrt("tensorrt_rtx"), Bundle.open(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
plan = ready_plan(bundle, "fp16", trt, None, BuildSettings(1, 2, 4), progress=progress)
print(plan.is_new, plan.record.plan_sha256, plan.kept_in)
"""


def _started(bundle: Bundle, *, is_killed: bool = False) -> subprocess.Popen[str]:
    """Return a process that has loaded everything and builds once it is sent a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", _READY.format(is_killed=is_killed), str(bundle.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_build_one_plan(rtx: TensorRt, bundle: Bundle, home: Path) -> None:
    processes = [_started(bundle) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        answers.append(out.split())
    assert sorted(is_new for is_new, _, _ in answers) == ["False", "True"]
    assert len({(sha256, path) for _, sha256, path in answers}) == 1
    assert [entry.reason for entry in PlanCache(cache_folder()).entries()] == [""]


def test_a_killed_build_leaves_no_usable_plan(rtx: TensorRt, bundle: Bundle, home: Path) -> None:
    process = _started(bundle, is_killed=True)
    _, err = process.communicate("go\n", timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    assert PlanCache(cache_folder()).entries() == []
    with pytest.raises(EngineUnavailable, match="no plan yet"):
        ready_plan(bundle, "fp16", rtx, None, may_build=False)
    # The lock went with the process.
    assert ready_plan(bundle, "fp16", rtx, None, SMALL).is_new


def test_a_second_builder_waits_and_says_so(rtx: TensorRt, bundle: Bundle, home: Path) -> None:
    messages: list[BuildProgress] = []
    is_waiting = threading.Event()

    def progress(state: BuildProgress) -> None:
        messages.append(state)
        is_waiting.set()

    with PlanCache(cache_folder()).lock():
        build = threading.Thread(
            target=ready_plan,
            args=(bundle, "fp16", rtx, None, SMALL),
            kwargs={"progress": progress},
        )
        build.start()
        assert is_waiting.wait(60)
        time.sleep(0.1)
        assert PlanCache(cache_folder()).entries() == []
    build.join(60)
    assert "another sbtk" in messages[0].waiting_for
    assert len(PlanCache(cache_folder()).entries()) == 1


def test_ctrl_c_keeps_nothing_and_frees_the_lock(rtx: TensorRt, bundle: Bundle, home: Path) -> None:
    def interrupt(_: BuildProgress) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ready_plan(bundle, "fp16", rtx, None, SMALL, progress=interrupt)
    assert PlanCache(cache_folder()).entries() == []
    assert ready_plan(bundle, "fp16", rtx, None, SMALL).is_new
