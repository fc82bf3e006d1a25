"""The GPU benchmark runs to completion, and writes complete tables after any failure.

Nothing is measured on a GPU: a dry run executes every stage on the CPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.commands import environment
from benchmarks.gpu_card import macs_per_image
from benchmarks.gpu_findings import Finding, Task
from benchmarks.gpu_process import run_stage
from benchmarks.gpu_timing import TimingConfig, time_by_clock
from benchmarks.gpu_training_data import cut_evenly, repeat_images, sketches_per_step
from sbtk_runtime.engines.registry import ENGINE_NAMES
from sbtk_train.batches.sampler import sample_class_balanced
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet
from sbtk_train.models.student import SbtknetStudent
from tests.tiny_data import write_dataset

Point = dict[str, Any]

# Prints two planned points, measures one, and ends as instructed.
_STAGE = """
import os, sys, time
from benchmarks.gpu_findings import Finding
first, second = Finding("made up", "first"), Finding("made up", "second", batch=8)
for finding in (first, second, first.measured({"images_per_s": 1.0})):
    print(finding.to_line(), flush=True)
print("half a li", end="", flush=True)
exec(sys.argv[1])
"""


def _benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "dry"
    done = _benchmark("--dry-run", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def points(out: Path) -> list[Point]:
    lines = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    assert lines[0]["machine"]["python"]
    return lines[1:]


def _of(points: list[Point], stage: str) -> dict[tuple[str, str, int], Point]:
    return {(p["subject"], p["source"], p["batch"]): p for p in points if p["stage"] == stage}


def test_a_dry_run_covers_every_point_once_and_reports_no_measurement(
    out: Path, points: list[Point]
) -> None:
    keys = [(p["stage"], p["subject"], p["source"], p["batch"]) for p in points]
    assert len(keys) == len(set(keys)) > 60
    assert {p["state"] for p in points} == {"measured", "failed", "not reached"}
    assert all(p["reason"] for p in points if p["state"] != "measured")
    assert all(json.loads(line)["dry_run"] for line in (out / "gpu.jsonl").read_text().splitlines())
    page = (out / "gpu.md").read_text()
    assert "DRY RUN on a CPU" in page.splitlines()[2]
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert len(titles) > 10
    assert all(title.endswith("(dry run)") for title in titles)


def test_the_tables_of_a_dry_run_have_no_gaps(out: Path) -> None:
    page = (out / "gpu.md").read_text()
    blocks = [block.splitlines() for block in page.split("\n\n") if block.startswith("| batch ")]
    assert len(blocks) == 9  # three figures, of torch from two sources and of the engines
    for block in blocks:
        assert block[0] == "| batch | 1 | 2 |"
        assert len(block) > 5
        cells = [cell.strip() for line in block[2:] for cell in line.split("|")[2:-1]]
        assert len(cells) == 2 * (len(block) - 2)
        assert all(re.match(r"[\d,.]+|failed|not reached", cell) for cell in cells)


def test_in_a_dry_run_only_what_needs_a_gpu_fails(points: list[Point]) -> None:
    of_torch = _of(points, "torch")
    assert len(of_torch) == 8 * 2 * 2
    for (subject, _, batch), point in of_torch.items():
        if subject.endswith("graph"):
            assert point["state"] == "failed"
            assert "needs a GPU" in point["reason"]
        else:
            figures = point["figures"]
            assert figures["least_cosine_to_fp32"] > 0.99
            assert figures["images_per_s"] > 0
            assert figures["p50_ms"] <= figures["p95_ms"]
            assert figures["share_of_peak"] > 0
            assert batch in (1, 2)
    trained = _of(points, "training")
    assert len(trained) == 5
    for (subject, _, _), point in trained.items():
        if subject == "fp16, channels_last":
            assert "fp16 on a CPU" in point["reason"]
        elif point["state"] == "failed":  # may be noise on a busy machine
            assert "more, which is within noise" in point["reason"]
        elif subject != "decoding alone":
            assert (point["figures"]["steps"], point["figures"]["batch"]) == (2, 8)


def test_every_engine_is_tried_and_those_of_the_cpu_run_the_model(
    points: list[Point],
) -> None:
    surveyed = {subject for subject, _, _ in _of(points, "survey")}
    assert surveyed == set(ENGINE_NAMES)
    engines = _of(points, "engines")
    on_gpu = {name for name in ENGINE_NAMES if "cuda" in name or "tensorrt" in name}
    assert {subject.split()[0] for subject, _, _ in engines} == on_gpu | {"onnxruntime"}
    opening = engines["onnxruntime fp16", "opening", 0]["figures"]
    assert opening["least_cosine_to_fp32"] > 0.999
    assert engines["onnxruntime fp16", "host", 2]["figures"]["macs_per_image"] > 1e8


def test_a_dry_run_requires_its_own_output_folder() -> None:
    done = _benchmark("--dry-run")
    assert done.returncode == 2
    assert "--out" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_keeps_old_results(tmp_path: Path) -> None:
    (tmp_path / "gpu.md").write_text("measured last year")
    done = _benchmark("--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("no GPU to measure on: torch finds no working")
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.md"]
    assert (tmp_path / "gpu.md").read_text() == "measured last year"


def test_points_beyond_the_time_limit_are_marked_as_not_reached(tmp_path: Path) -> None:
    """The first stage gets less time than importing torch takes."""
    done = _benchmark("--dry-run", "--out", str(tmp_path / "out"), "--budget-s", "0.1")
    assert done.returncode == 1
    assert "out of time" in done.stderr


@pytest.mark.parametrize(
    ("ending", "seconds", "reason"),
    [
        ("os.abort()", 60.0, "signal 6"),
        ("sys.exit(5)", 60.0, "exit code 5"),
        ("time.sleep(600)", 4.0, "killed after its 4 s"),
        ("pass", 60.0, "the stage ended before it"),
    ],
)
def test_a_stage_that_crashes_or_hangs_loses_only_its_remaining_points(
    tmp_path: Path, ending: str, seconds: float, reason: str
) -> None:
    found: list[Finding] = []
    task = Task("made up", time.monotonic() + seconds, tmp_path)
    run_stage(task, found.append, tmp_path / "log", (sys.executable, "-c", _STAGE, ending))
    outcome = {finding.subject: finding for finding in found if finding.state != "planned"}
    assert outcome["first"].figures == {"images_per_s": 1.0}
    assert outcome["second"].state == "not reached"
    assert outcome["second"].batch == 8
    assert reason in outcome["second"].reason


def test_output_of_libraries_does_not_mix_with_the_findings(tmp_path: Path) -> None:
    found: list[Finding] = []
    noise = "os.write(1, b'[TRT] noise from C++\\n'); sys.exit(0)"
    task = Task("made up", time.monotonic() + 60, tmp_path)
    run_stage(task, found.append, tmp_path / "log", (sys.executable, "-c", _STAGE, noise))
    assert {finding.subject for finding in found} == {"first", "second"}


def test_a_task_can_be_sent_to_another_process(tmp_path: Path) -> None:
    for task in (
        Task("torch", 12.5, tmp_path),
        Task("training", 1.0, tmp_path, True, tmp_path / "data", "bundles/mine"),
    ):
        assert Task.from_text(task.to_text()) == task


@pytest.mark.parametrize(("backbone", "gmacs"), [("resnet18", 1.81), ("resnet50-v1.5", 4.09)])
def test_macs_equal_those_of_torchs_counter(backbone: str, gmacs: float) -> None:
    student = SbtknetStudent(backbone, 512, classes=2).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        student.embed(torch.zeros(1, 3, 224, 224))
    macs = macs_per_image(student, 224)
    assert 2 * macs == counter.get_total_flops()
    assert macs == pytest.approx(gmacs * 1e9, rel=0.01)


@pytest.mark.parametrize("quadruplets", [2, 3, 16])
@pytest.mark.parametrize(("cut", "decoded"), [(repeat_images, "few"), (cut_evenly, "all")])
def test_an_epoch_of_reduced_data_has_the_requested_steps_and_variety(
    tmp_path: Path,
    cut: Callable[[ImageSet, int, int], ImageSet],
    decoded: str,
    quadruplets: int,
) -> None:
    data = read_dataset(write_dataset(tmp_path, sketches=20, photos=20))
    batches = list(sample_class_balanced(cut(data, 7, quadruplets), quadruplets, 0, 0))
    assert len(batches) == 7
    per_step = sketches_per_step(data, quadruplets)
    shown: set[int] = set()
    for number, batch in enumerate(batches):
        rows = set(batch.sketches.tolist())
        assert len(batch.sketches) == len(batch.photos) == per_step
        if decoded == "few" and number >= 3:  # by then each of the six classes had its turn
            assert len(rows - shown) <= 2
        shown |= rows
    if decoded == "all":
        assert len(shown) > 0.8 * 7 * per_step


def test_speeds_agree_with_the_clock() -> None:
    figures = time_by_clock(lambda: time.sleep(0.005), 4, TimingConfig(0.0, 0.05, 3))
    assert 0 < figures["images_per_s"] <= 4 / 0.005
    assert figures["p50_ms"] >= 5
    assert figures["runs"] >= 3


def test_the_script_can_be_imported_without_torch() -> None:
    """Each stage is a process; those of the engines must not load torch's CUDA libraries."""
    code = (
        "import sys, benchmarks.gpu, benchmarks.gpu_engines; "
        "sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert done.returncode == 0
    assert os.access(Path(__file__).parents[1] / "benchmarks" / "gpu.py", os.R_OK)
