"""`sbtk engine`: plans are built, listed and removed, and errors are reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbtk_cli.engine import LINE_EVERY_S, build_status
from sbtk_cli.main import main
from sbtk_runtime.engines.tensorrt.build import BuildProgress
from sbtk_runtime.files import sha256_of_file
from tests.fakes.machine import SURFACES, FakeMachine, fake_machine
from tests.tiny import tiny_bundle, write_tiny_manifest
from tests.tiny_conv import tiny_conv_model
from tests.tiny_regions import tiny_map_bundle

ROOT = Path(__file__).parents[2]
RTX = ["--module", "tensorrt_rtx"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with `bundles/tiny`, whose cache of plans, `cache`, is empty."""
    pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed")
    folder = tiny_bundle(tmp_path / "bundles" / "tiny")
    for name, kind in (("fp16", "fp16"), ("int8.trt", "int8 for TensorRT")):
        content = tiny_conv_model(kind).SerializeToString()  # type: ignore[arg-type]
        (folder / f"model.{name}.onnx").write_bytes(content)
    write_tiny_manifest(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def gpu(work: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """The same folder, on a machine with a fake GPU and TensorRT 10."""
    return fake_machine(monkeypatch, SURFACES[0])


def test_a_plan_is_built_once_and_listed(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", "build", "tiny", "--batch", "1,2,4", *RTX]) == 0
    printed = capsys.readouterr()
    first, kept = printed.out.splitlines()
    assert first.startswith("tiny@")
    assert "fp16 for tensorrt_rtx" in first
    assert "on any GPU, batches 1,2,4: 3.7 MB, built in" in first
    assert "built but not run: there is no NVIDIA driver" in printed.err
    plan = work / kept.removeprefix("saved in ")
    assert plan.stat().st_size > 1_000_000
    before = plan.stat().st_mtime_ns
    assert main(["engine", "build", "tiny", "--batch", "1,2,4", "-q", *RTX]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].endswith("already built")
    assert printed.err == ""
    assert plan.stat().st_mtime_ns == before
    assert main(["engine", "list"]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == [
        *("MODEL", "PRECISION", "TENSORRT", "GPU", "BATCHES", "SIZE", "BUILT", "STATE")
    ]
    assert " 1,2,4 " in row
    assert row.endswith("not used: this machine has no GPU")
    assert main(["engine"]) == 0
    assert capsys.readouterr().out.splitlines() == [heading, row]


def test_each_precision_is_built_from_its_own_file(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"fp16": "model.fp16.onnx", "int8": "model.int8.trt.onnx", "fp32": "model.fp32.onnx"}
    for precision, name in names.items():
        words = ["--precision", precision, "--batch", "2", "--workspace", "256MiB", "--json", "-q"]
        assert main(["engine", "build", "bundles/tiny", *words, *RTX]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        built = json.loads(printed.out)
        assert built["onnx_sha256"] == sha256_of_file(work / "bundles" / "tiny" / name)
        assert built["precision"] == precision
        assert (built["device"], built["check"], built["is_new"]) == ("none", None, True)
        settings = built["settings"]
        assert [settings[f"batch_{which}"] for which in ("min", "opt", "max")] == [1, 2, 2]
        assert settings["workspace_bytes"] == 256 << 20
        assert sha256_of_file(Path(built["plan"])) == built["plan_sha256"]
    assert main(["engine", "list", "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {entry["precision"] for entry in listed} == set(names)
    assert not any(entry["is_usable"] for entry in listed)


def test_with_a_gpu_the_plan_is_compared_with_onnx_runtime(
    gpu: FakeMachine, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["engine", "build", "tiny", "--precision", "fp32", "--batch", "1,4,8"]
    assert main(words) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "for tensorrt 10.16.1" in lines[0]
    assert "runs on this machine; smallest cosine with onnxruntime " in lines[1]
    assert float(lines[1].rsplit(" ", 1)[1]) > 0.9999
    assert main([*words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert not again["is_new"]
    assert again["check"]["cosine_min"] > 0.9999
    assert again["device"] != "none"
    assert main(["engine", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("usable")
    assert not gpu.alive()


def test_a_plan_for_regions_is_built_in_addition_to_that_for_whole_frames(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_map_bundle(work / "bundles" / "map")
    words = [
        "engine",
        "build",
        "bundles/map",
        "--precision",
        "fp32",
        "--batch",
        "2",
        *RTX,
        "--json",
    ]
    built = []
    for more in ([], ["--regions"], ["--regions", "9"], ["--regions", "16"]):
        assert main([*words, *more]) == 0
        built.append(json.loads(capsys.readouterr().out))
    assert [each["is_new"] for each in built] == [True, True, True, False]
    assert len({each["onnx_sha256"] for each in built}) == 3
    assert main([*words, "--regions", "7"]) == 2
    assert "'7' is not 9 or 16" in capsys.readouterr().err


def test_with_a_gpu_a_plan_for_regions_is_compared_with_onnx_runtime(
    gpu: FakeMachine, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_map_bundle(work / "bundles" / "map")
    words = ["engine", "build", "bundles/map", "--precision", "fp32", "--batch", "4", "--regions"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"]["cosine_min"] > 0.9999
    assert not gpu.alive()


def test_a_plan_that_does_not_run_is_an_error_and_is_not_kept(
    gpu: FakeMachine, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.faults.deserialise = "The engine plan file is not compatible with this device."
    assert main(["engine", "build", "tiny", "--precision", "fp32", "--batch", "4"]) == 1
    printed = capsys.readouterr()
    assert "not compatible with this device" in printed.err
    assert printed.out == ""
    assert plans(work) == []


def test_tensorrt_needs_a_driver(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The module is there, as on a machine whose driver is missing."""
    faults = fake_machine(monkeypatch, SURFACES[0]).cuda_faults
    faults.driver, faults.count = 0, "cudaErrorInsufficientDriver"
    assert main(["engine", "build", "tiny", "--module", "tensorrt"]) == 1
    assert "Error: there is no NVIDIA driver on this machine" in capsys.readouterr().err
    assert plans(work) == []


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["nowhere"], 1, "there is no bundle 'nowhere'"),
        (["tiny", "--batch", "32,1,256"], 2, "batches 32, 1, 256"),
        (["tiny", "--batch", "1,32,5000"], 2, "from 1 to 4096"),
        (["tiny", "--batch", "0"], 2, "batches 1, 0, 0"),
        (["tiny", "--batch", "many"], 2, "--batch 'many'"),
        (["tiny", "--batch", "1,2"], 2, "--batch '1,2'"),
        (["tiny", "--batch", "1,,3"], 2, "--batch '1,,3'"),
        (["tiny", "--batch", "-1,2,3"], 2, "--batch '-1,2,3'"),
        (["tiny", "--workspace", "4 potatoes"], 2, "a size such as 512MiB or 4GiB"),
        (["tiny", "--precision", "int4"], 2, "int4"),
        (["tiny", "--module", "tensorflow"], 2, "unknown TensorRT 'tensorflow'"),
        (["tiny", "--module", "tensorrt"], 1, 'pip install "sbtk[tensorrt]"'),
        (["tiny", "--device", "cpu", *RTX], 2, "unknown GPU 'cpu'"),
        (["tiny", "--device", "cuda:1", *RTX], 1, "there is no NVIDIA driver on this machine"),
        (["tiny", "--workspace", "0", *RTX], 1, "try a larger --workspace"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main(["engine", "build", *words]) == code
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.out == ""
    assert plans(work) == []


def test_a_bundle_without_tensorrts_int8_names_the_export(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "bundles" / "tiny" / "model.int8.trt.onnx").unlink()
    write_tiny_manifest(work / "bundles" / "tiny")
    assert main(["engine", "build", "tiny", "--precision", "int8", *RTX]) == 1
    printed = capsys.readouterr()
    assert "no int8 model for TensorRT" in printed.err
    assert "sbtk export RUN --int8-trt" in printed.err


def test_errors_of_tensorrt_are_quoted(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """INT8 as CPUs take it lies under the name of TensorRT's."""
    content = tiny_conv_model("int8 for CPUs").SerializeToString()
    (work / "bundles" / "tiny" / "model.int8.trt.onnx").write_bytes(content)
    write_tiny_manifest(work / "bundles" / "tiny")
    assert main(["engine", "build", "tiny", "--precision", "int8", *RTX]) == 1
    printed = capsys.readouterr()
    assert "refuses bundles/tiny/model.int8.trt.onnx:\n    " in printed.err
    assert plans(work) == []


def test_a_cache_that_cannot_be_used_is_refused_before_the_build(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "cache").write_text("a file where the folder should be")
    assert main(["engine", "build", "tiny", *RTX]) == 1
    printed = capsys.readouterr()
    assert "the cache of plans cannot be created" in printed.err
    assert "building" not in printed.err
    assert main(["engine", "list"]) == 1
    assert main(["engine", "clear", "--all"]) == 1


def test_a_cache_that_others_may_write_is_not_trusted(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engine", "build", "tiny", "--batch", "2", "-q", *RTX]) == 0
    (plan,) = plans(work)
    plan.chmod(0o666)
    capsys.readouterr()
    assert main(["engine", "list"]) == 0
    assert "may be written by others" in capsys.readouterr().out
    plan.parent.parent.chmod(0o777)
    assert main(["engine", "list"]) == 1
    assert "may be written by others" in capsys.readouterr().err


def test_clear_removes_the_plans_of_one_model_or_all(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_bundle(work / "bundles" / "other", seed=1, name="other")
    (other / "model.fp16.onnx").write_bytes(tiny_conv_model("fp16", seed=1).SerializeToString())
    write_tiny_manifest(other, name="other")
    for words in (["tiny", "--batch", "1"], ["tiny", "--batch", "2"], ["other", "--batch", "1"]):
        assert main(["engine", "build", *words, "-q", *RTX]) == 0
    sizes = sum(path.stat().st_size for path in plans(work) if path.name.startswith("tiny-"))
    capsys.readouterr()
    assert main(["engine", "clear", "bundles/tiny", "--json"]) == 0
    cleared = json.loads(capsys.readouterr().out)
    assert cleared["plans"] == 2
    assert sizes <= cleared["size_bytes"] < sizes + 10_000
    assert [path.name.partition("-")[0] for path in plans(work)] == ["other"]
    assert main(["engine", "clear", "tiny"]) == 0
    assert capsys.readouterr().out == "removed 0 plans, 0 bytes\n"
    assert main(["engine", "clear", "--all"]) == 0
    assert capsys.readouterr().out.startswith("removed 1 plan, ")
    assert plans(work) == []
    assert main(["engine", "list"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "There are no plans yet" in printed.err


def test_plans_of_a_deleted_bundle_are_cleared_by_name(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engine", "build", "tiny", "--batch", "1", "-q", *RTX]) == 0
    (work / "bundles").rename(work / "elsewhere")
    assert main(["engine", "clear", "tiny"]) == 0
    assert plans(work) == []
    assert main(["engine", "clear", "tiny"]) == 1
    assert "there is no plan of 'tiny'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["tiny", "--all"]])
def test_clear_requires_a_model_or_all(
    work: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["engine", "clear", *words]) == 2
    assert "a BUNDLE or --all" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_build_leaves_no_plan(
    work: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """The signal comes as soon as the build has begun, which it says."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sbtk_cli", "engine", "build", "tiny", *RTX],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")])},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("building"):
            break
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    endings = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert process.returncode == endings[number]
    assert out == ""
    assert main(["engine", "list"]) == 0
    assert "There are no plans yet" in capsys.readouterr().err
    assert main(["engine", "build", "tiny", *RTX]) == 0
    assert len(plans(work)) == 1


def test_progress_without_a_terminal_is_one_line_a_minute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with build_status() as status:
        for tenth in range(1800):
            status.progress(
                BuildProgress(tenth / 10, "Building engine", 3, 9, "tactics of layer 7")
            )
    lines = capsys.readouterr().err.splitlines()
    assert LINE_EVERY_S == 60
    assert lines == [
        f"{seconds} s, Building engine: 3 of 9, waiting for tactics of layer 7"
        for seconds in (60, 120)
    ]


def test_progress_is_one_line_in_place_on_a_terminal() -> None:
    """Run in a terminal of its own, whose output is read back."""
    code = """
import time
from sbtk_cli.engine import build_status
from sbtk_runtime.engines.tensorrt.build import BuildProgress
with build_status() as status:
    for second in range(3):
        status.progress(BuildProgress(float(second), "", 0, 0, "the ONNX parser"))
        time.sleep(0.3)
    status.notify("the plan was [built]")
"""
    import pty

    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM="xterm", PYTHONPATH=f"{ROOT}:{ROOT / 'cli'}", COLUMNS="100")
        os.execv(sys.executable, [sys.executable, "-c", code])
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the terminal's other side is closed
            break
        if not part:
            break
        shown += part
    assert os.waitpid(process, 0)[1] == 0
    assert b"2 s, waiting for the ONNX parser" in shown
    # What is said has a line of its own; all else is told in one place.
    assert b"\x1b[2Kthe plan was [built]\r\n" in shown
    assert shown.count(b"\n") < 4
    assert b"\x1b[2K" in shown


def plans(work: Path) -> list[Path]:
    return sorted((work / "cache" / "sbtk" / "plans").glob("*.plan"))
