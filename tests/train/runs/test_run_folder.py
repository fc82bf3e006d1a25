"""Run folders have one writer, and a full disk is reported as such."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sbtk_cli.main import main
from sbtk_runtime.errors import BadConfig, BadModel, DiskFull, SbtkError
from sbtk_train.runs.checkpoint import (
    LAST,
    LOCK,
    STUDENT,
    RunBusy,
    load_run,
    load_state,
    locked,
    require_space,
    save_student,
)
from tests.train.runs.test_run import run, tiny_config

pytestmark = pytest.mark.slow

TINY = """
    --weights none --backbone resnet18 --size 32 --final-epochs 0 --quadruplets 2 --dim 8
    --validation-classes 2 --precision fp32 --threads 1 --seed 3 --no-knowledge --epochs 1 --quiet
""".split()  # noqa: SIM905


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return an empty disk of 16 MB; a run of a narrow ResNet18 saves some 10 MB at a time."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)], capture_output=True
    )
    if made.returncode:
        pytest.skip("this user may not mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_every_writer_names_the_holder_of_a_run_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(tiny_config(data), folder)
    (tmp_path / "study").mkdir()
    (tmp_path / "empty").mkdir()
    study = [word for word in TINY if word not in ("--dim", "8", "--seed", "3", "--no-knowledge")]
    with locked(folder), locked(tmp_path / "study"), locked(tmp_path / "empty"):
        for words in (
            ["train", str(data), *TINY, "--out", str(folder)],
            ["train", str(data), *TINY, "--out", str(tmp_path / "empty")],
            ["train", "--resume", str(folder)],
            ["average", str(folder), str(folder), "--out", str(tmp_path / "empty")],
            [
                *("train", str(data), *study, "--ablation", "--row", "triplet"),
                *("--out", str(tmp_path / "study")),
            ],
        ):
            assert main(words) == 1, words
            shown = capsys.readouterr().err
            assert f"is being written by another sbtk (PID {os.getpid()}, since" in shown
            assert "one writer in a run folder" in shown
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {LOCK}


def test_the_lock_of_a_dead_process_is_released(data: Path, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from sbtk_runtime.files import WriterLock\n"
        "with WriterLock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / LOCK)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusy, match=f"PID {holder.pid}"), locked(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(tmp_path):
        pass


def test_a_run_is_not_started_in_the_folder_of_another(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, epochs=1)
    run(config, tmp_path / "run")
    before = (tmp_path / "run" / LAST).read_bytes()
    with pytest.raises(BadConfig, match="already holds a run") as caught:
        run(replace(config, seed=9), tmp_path / "run")
    assert "sbtk train --resume" in caught.value.next_step
    assert (tmp_path / "run" / LAST).read_bytes() == before
    # A mean of runs and a finished run of a study have no checkpoint.
    (tmp_path / "run" / LAST).unlink()
    student = (tmp_path / "run" / STUDENT).read_bytes()
    with pytest.raises(BadConfig, match="already holds a finished student"):
        run(replace(config, seed=9), tmp_path / "run")
    assert (tmp_path / "run" / STUDENT).read_bytes() == student


def test_a_student_that_the_record_does_not_describe_is_refused(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, epochs=1)
    run(config, tmp_path / "run")
    run(replace(config, seed=9), tmp_path / "other")
    shutil.copy(tmp_path / "other" / STUDENT, tmp_path / "run" / STUDENT)
    with pytest.raises(BadModel, match=r"is not the student whose metrics are in run\.json"):
        load_run(tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SbtkError, match="cannot be written"), locked(tmp_path / "nowhere"):
        pass


def test_free_space_is_checked_before_the_first_epoch(data: Path, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(DiskFull, match=r"needs [\d,]+ bytes, and the disk at / has|the disk at"):
        require_space(tmp_path, free, 1)
    require_space(tmp_path, 1, 1)


def test_too_small_a_disk_is_reported_before_training(data: Path, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(10 << 20))
    with pytest.raises(DiskFull, match=rf"the disk at {small_disk} has"):
        run(tiny_config(data), small_disk / "run")
    assert not (small_disk / "run" / LAST).exists()
    (small_disk / "other").unlink()
    config = replace(tiny_config(data, epochs=1, optimizer="sgd", momentum=0.0, average_decay=0.0))
    run(config, small_disk / "run")


def test_a_disk_that_fills_while_saving_is_named_with_the_bytes_and_a_command_that_works(
    data: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knobs: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "average_decay": 0.0}
    folder = small_disk / "run"
    ballast = small_disk / "ballast"

    def fill(_: object) -> None:
        if (folder / STUDENT).exists() and not ballast.exists():
            free = shutil.disk_usage(small_disk).free
            ballast.write_bytes(bytes(free - (1 << 20)))

    folder.mkdir()
    from sbtk_train.runs.run import train

    with pytest.raises(DiskFull) as caught:
        train(tiny_config(data, epochs=3, **knobs), folder, fill)
    error = caught.value
    assert f"no space left on the disk at {small_disk}" in error.found
    assert "bytes needed" in error.found
    assert error.next_step == f"free some space, then: sbtk train --resume {folder}"
    assert load_state(folder)[1].epoch >= 1
    assert not [path for path in folder.iterdir() if ".tmp-" in path.name]
    ballast.unlink()
    words = error.next_step.partition("then: sbtk ")[2].split()
    assert main(words) == 0, capsys.readouterr().err
    assert load_state(folder)[1].epoch == 3


def test_an_average_that_fails_to_save_leaves_no_folder(tmp_path: Path, small_disk: Path) -> None:
    tensors = {"weight": torch.zeros(60 << 20)}
    with pytest.raises(DiskFull, match=f"no space left on the disk at {small_disk}") as caught:
        save_student(small_disk, tensors, "resnet18")
    assert f"{240 << 20:,} bytes needed" in caught.value.found
    assert not list(small_disk.iterdir())


def test_other_system_errors_while_saving_are_named(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DiskFull, match="cannot be written: File too large") as caught:
            save_student(tmp_path, {"weight": torch.zeros(1 << 20)}, "resnet18")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{4 << 20:,} bytes" in caught.value.found
    assert caught.value.next_step.endswith(", then: the same command again")
    assert not list(tmp_path.iterdir())
