"""Several processes, started by torchrun, train the same student as one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sbtk_train.runs.checkpoint import LAST, load_run, load_state
from tests.several_processes import (
    CONFIGS,
    INTERRUPTED,
    STOPPED,
    UNEVEN,
    loss_of,
    run,
    small_student,
    state_after,
    whole_batch,
)
from tests.tiny_data import write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow_resnet18")]

_ROOT = Path(__file__).parents[2]
#: `sbtk` as a process with the ResNet18 of these tests.
NARROW_SBTK = _ROOT / "tests" / "narrow_resnet.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def torchrun(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), sketches=3, photos=3)


@pytest.fixture(scope="module")
def shared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes filled together."""
    folder = tmp_path_factory.mktemp("shared")
    done = torchrun("-m", "tests.several_processes", str(data), str(folder), cwd=_ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of two tensors, as a share of the expected one's length."""
    assert found.keys() == expected.keys()
    return max(
        float((found[key] - value).float().norm()) / (float(value.float().norm()) + 1e-6)
        for key, value in expected.items()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_give_the_losses_and_the_student_of_one(
    name: str, shared: Path, data: Path, tmp_path: Path
) -> None:
    alone = run(CONFIGS[name](data), tmp_path)
    together = json.loads((shared / f"{name}.json").read_text())
    assert len(alone) >= 2
    assert len(together) == len(alone) - (name == INTERRUPTED)
    for found, expected in zip(reversed(together), reversed(alone), strict=False):
        assert found == pytest.approx(expected, rel=1e-4)
    (found, position), (expected, one_position) = (
        load_state(folder) for folder in (shared / name, tmp_path)
    )
    assert (position.updates, position.best) == (one_position.updates, one_position.best)
    # The optimiser's sums of gradients say more than weights after a few small steps.
    assert sum(key.startswith("optimizer.") for key in expected) > 40
    assert largest_difference(found, expected) < 0.05
    load_run(shared / name)


def test_only_the_first_process_writes(shared: Path) -> None:
    others = shared / "process-1"
    assert {path.name for path in others.iterdir()} == {*CONFIGS}
    assert [path for path in others.rglob("*") if path.is_file()] == []
    record = json.loads((shared / "contrastive" / "run.json").read_text())
    assert record["processes"] == 2
    assert record["epochs_done"] == 1


def test_a_stop_of_any_process_stops_all_and_the_run_resumes_to_the_same_student(
    shared: Path, tmp_path: Path
) -> None:
    # That it ended as one process does without a stop, is among the cases above.
    folder = shared / INTERRUPTED
    shutil.copy(folder / STOPPED, tmp_path / LAST)
    assert load_state(tmp_path)[1].step == 1
    last_step = json.loads((shared / f"{INTERRUPTED}.json").read_text())
    assert len(last_step) == 1
    assert load_state(folder)[1].updates == 2


@pytest.mark.parametrize("name", UNEVEN)
def test_shards_of_different_lengths_give_the_gradients_and_moments_of_the_full_batch(
    name: str, shared: Path
) -> None:
    student = small_student()
    loss = loss_of(student(whole_batch(*UNEVEN[name])[1]))
    loss.backward()  # type: ignore[no-untyped-call]
    expected = {"loss": loss.detach(), **state_after(student)}
    found = torch.load(shared / f"{name}.pt", weights_only=True)
    # The head that the loss does not read has no gradient, and so its weights do not decay.
    assert "soft.weight" not in expected
    assert "embedding.weight" in expected
    assert largest_difference(found, expected) < 1e-3


TINY = """
    --weights none --backbone resnet18 --size 32 --final-epochs 0 --quadruplets 2 --dim 8
    --validation-classes 2 --precision fp32 --threads 1 --device cpu --out run
""".split()  # noqa: SIM905


def test_a_signal_to_torchrun_leaves_a_checkpoint_to_resume(data: Path, tmp_path: Path) -> None:
    words = [*TINY, "--epochs", "400", "--checkpoint-minutes", "0"]
    running = subprocess.Popen(
        [*TORCHRUN, str(NARROW_SBTK), "train", str(data), *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    last = tmp_path / "run" / LAST
    deadline = time.monotonic() + 200
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, shown = running.communicate(timeout=60)
    assert running.returncode != 0
    assert shown.count("saving after this step") == 1
    assert shown.count("Interrupted.") + shown.count("Terminated.") == 1
    assert "Error:" not in [line[:6] for line in shown.splitlines()]
    assert load_state(last.parent)[1].updates > 0


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="folders of its own for each process need unshare, and the right to mount",
)
def test_an_error_in_one_process_ends_all_with_one_message(data: Path, tmp_path: Path) -> None:
    for rank in range(2):
        shutil.copytree(data, tmp_path / str(rank) / "data")
    # The first process checks the data; the second has a share of every batch of it.
    for sketch in (tmp_path / "1" / "data" / "sketch").rglob("*.png"):
        sketch.write_bytes(b"not an image")
    # Each process sees its own images at the one path that the run names.
    (tmp_path / "data").mkdir()
    train = (
        f"cd $RANK && mount --bind data ../data && "
        f"exec {sys.executable} -P {NARROW_SBTK} train ../data {' '.join(TINY)}"
    )
    apart = ("unshare", "--mount", "--propagation", "private", "bash", "-c")
    done = torchrun("--no-python", *apart, train, cwd=tmp_path)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert "was readable at the start, but no longer" in errors[0]
    assert "sbtk_train" not in done.stderr  # no traceback of ours
    assert "saving" not in done.stderr  # torchrun's signal to the others comes too late for that
    assert not (tmp_path / "1" / "run").exists()
