"""`sbtk train`: runs, resumed runs, and their output."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from sbtk_cli.main import main
from sbtk_cli.options import Terminated
from sbtk_cli.train import merge_resumed_config, stop_on_signal
from sbtk_runtime.errors import BadConfig
from sbtk_train.config import read_config
from sbtk_train.runs.checkpoint import LAST, STUDENT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow_resnet18")]

if TYPE_CHECKING:
    from sbtk_train.runs.loop import Trainer

TINY = """
    --weights none --backbone resnet18 --size 32 --final-epochs 0 --quadruplets 2 --dim 8
    --validation-classes 2 --precision fp32 --threads 1 --seed 3
""".split()  # noqa: SIM905
#: `sbtk` as a process with the ResNet18 of these tests.
NARROW_SBTK = Path(__file__).parents[1] / "narrow_resnet.py"
NO_WEIGHTS = ("--weights", "none")
NONE_HELD_OUT = ("--validation-classes", "0")
#: A run that is over sooner: refitting embeds all images once more, at full size.
QUICK = (*TINY, "--no-refit")
#: Of these, what the rows of the ablation decide.
LEFT_OPEN = ("--dim", "8", "--seed", "3")


def sbtk(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has torch already."""
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SBTK_DATA", "")
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def test_train_ends_with_the_run_folder_and_the_next_command(data: Path, tmp_path: Path) -> None:
    """With the real ResNet18, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "sbtk_cli", "train", str(data), *TINY, "--epochs=1", "--name=mine"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "SBTK_DATA": ""},
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / done.stdout.strip()
    assert (run / STUDENT).is_file()
    assert run.parent == tmp_path / "runs"
    assert run.name.endswith("-mine")
    assert f"next: sbtk export {done.stdout.strip()}" in done.stderr
    assert "images/s" in done.stderr
    assert "without the knowledge loss" in done.stderr


def test_json_prints_a_line_for_each_epoch(data: Path, tmp_path: Path) -> None:
    done = sbtk("train", str(data), *QUICK, "--epochs", "2", "--json", "--quiet", cwd=tmp_path)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines()]
    assert [row["epoch"] for row in rows] == [1.0, 2.0]
    assert rows[0]["validation_p10"] is None  # of eight photos
    assert done.stderr == ""


@pytest.mark.kill
def test_an_interrupted_run_is_resumed(data: Path, tmp_path: Path) -> None:
    words = [*QUICK, "--epochs", "400", "--out", "run", "--checkpoint-minutes", "0"]
    running = subprocess.Popen(
        [sys.executable, "-P", str(NARROW_SBTK), "train", str(data), *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / LAST).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, shown = running.communicate(timeout=60)
    assert running.returncode == 143
    assert shown.endswith("saved; next: sbtk train --resume run\nTerminated.\n")
    config = tmp_path / "run" / "config.resolved.toml"
    config.write_text(config.read_text().replace("epochs = 400", "epochs = 2"))
    again = sbtk("train", "--resume", "run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming run" in again.stderr
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) >= 3


@pytest.mark.parametrize(
    ("number", "ending"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, Terminated),
        (signal.SIGHUP, Terminated),
    ],
)
def test_a_stopped_run_keeps_the_signals_exit_code(
    number: signal.Signals, ending: type[KeyboardInterrupt]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stopped, stop_on_signal() as hold:
        hold.trainer = cast("Trainer", StopsAtOnce())
        signal.raise_signal(number)
        assert hold.is_stopping
        raise KeyboardInterrupt  # as the trainer does after the step
    assert type(stopped.value) is ending
    assert signal.getsignal(number) is before


class StopsAtOnce:
    """What a signal asks of a trainer."""

    def stop_soon(self) -> None:
        """Do nothing: the test raises."""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], "no data to train on"),
        (["train", "nowhere", *TINY], "there is no folder nowhere"),
        (["train", "DATA", *TINY, "--split", "SK-XX"], "no split named 'SK-XX'"),
        (["train", "DATA", *TINY, "--recipe", "cake"], "no recipe 'cake'"),
        (["train", "DATA", *TINY, "--validation-classes", "5"], "6 seen classes"),
        (["train", "DATA", *TINY, "--device", "cuda"], "no working CUDA device"),
        (["train", "DATA", "--weights", "gone.pth"], "no weights file gone.pth"),
        (["train", "--resume", "nowhere"], "is not a run"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(
    data: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    done = sbtk(*[str(data) if word == "DATA" else word for word in words], cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unseen_class_on_the_list_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    listed, unseen = tmp_path / "classes.txt", tmp_path / "unseen.txt"
    listed.write_text("arch\nball\ncrate\ndisc\neasel\n")
    unseen.write_text("disc\n")
    words = ("train", str(data), *TINY, "--split", str(unseen), "--classes", str(listed))
    refused = sbtk(*words, cwd=tmp_path)
    assert refused.returncode == 1
    assert "disc, unseen in unseen.txt" in refused.stderr
    gone = sbtk(*words[:-1], "gone.txt", cwd=tmp_path)
    assert gone.returncode == 2
    assert "gone.txt cannot be read" in gone.stderr


def test_a_finished_run_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    words = ("train", str(data), *QUICK, "--epochs", "1", "--out", "run")
    assert sbtk(*words, cwd=tmp_path).returncode == 0
    again = sbtk(*words, cwd=tmp_path)
    assert again.returncode == 2
    assert "--resume run" in again.stderr


def test_resuming_refuses_options_that_differ_and_names_both_values(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sbtk("train", str(data), *QUICK, "--epochs", "1", "--out", "run", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    other = tmp_path / "other"
    other.mkdir()
    for words, sentence in (
        (["--method", "dsn"], "--method dsn, and the run was started with sbtknet"),
        (["--split", "SK-SH"], "--split SK-SH, and the run was started with SK-YE"),
        (["--dim", "64"], "--dim 64, and the run was started with 8"),
        (["--margin", "0.5"], "--margin 0.5, and the run was started with 0.2"),
        (["--no-identity"], "--no-identity, and the run was started without it"),
        (["--teacher", "other.pth"], "--teacher other.pth, and the run was started with none"),
        (["--memory", "paper"], "--memory paper, and sbtknet has no such setting"),
        ([str(other)], f"DATA {other}, but the run was started with {data}"),
    ):
        assert main(["train", *words, "--resume", str(tmp_path / "run")]) == 2
        assert sentence in capsys.readouterr().err
    again = sbtk("train", str(data), "--dim", "8", "--resume", "run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_a_run_resumes_with_other_devices_and_threads(data: Path, tmp_path: Path) -> None:
    first = sbtk("train", str(data), *QUICK, "--epochs", "1", "--out", "run", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    own = read_config(tmp_path / "run")
    given = ["threads", "workers", "checkpoint_minutes", "device"]
    values = {"threads": 3, "workers": 5, "checkpoint_minutes": 0.5, "device": "cpu"}
    now = merge_resumed_config(own, None, given, values)
    assert (now.threads, now.workers, now.checkpoint_minutes, now.device) == (3, 5, 0.5, "cpu")
    assert replace(now, **{name: getattr(own, name) for name in given}) == own
    frozen = replace(own, freeze_until="layer4")
    with pytest.raises(BadConfig, match="a run that was started without"):
        merge_resumed_config(
            frozen, None, ["feature_folder"], {"feature_folder": tmp_path / "maps"}
        )
    again = sbtk("train", "--resume", "run", "--device", "cuda:7", cwd=tmp_path)
    assert again.returncode == 2
    assert "cuda:7" in again.stderr


def test_options_of_another_method_are_refused(data: Path, tmp_path: Path) -> None:
    refused = sbtk("train", str(data), *TINY, "--memory", "paper", cwd=tmp_path)
    assert refused.returncode == 2
    assert "sbtknet has no setting 'memory'" in refused.stderr
    refused = sbtk("train", str(data), "--ablation", "--metric", "triplet", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--metric with --ablation" in refused.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["DATA", "--seeds", "2"], "--seeds and --row go with --ablation"),
        (["DATA", "--row", "triplet"], "--seeds and --row go with --ablation"),
        (["DATA", "--ablation", "--name", "mine"], "--name is for a single run"),
        (["DATA", "--ablation", "--refit"], "--refit with --ablation"),
        (["DATA", *NO_WEIGHTS, *NONE_HELD_OUT], "0 validation classes to choose the student by"),
        (["--ablation", "--resume", "run"], "leave out --resume"),
        (["--resume", "run", "--out", "other"], "leave out --out and --name"),
        (["--resume", "run", "--name", "other"], "leave out --out and --name"),
    ],
)
def test_options_without_effect_are_usage_errors(
    data: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["train", *(str(data) if word == "DATA" else word for word in words)]) == 2
    assert sentence in capsys.readouterr().err


def test_an_ablation_without_a_teacher_is_refused_before_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [word for word in TINY if word not in LEFT_OPEN]
    words = ["train", str(data), *tiny, "--ablation", "--out", str(tmp_path / "study")]
    rows = ["--row", "triplet", "--row", "quadruplet-knowledge", "--row", "dsn-64"]
    assert main([*words, *rows]) == 2
    shown = capsys.readouterr().err
    assert "no weights and no --teacher for quadruplet-knowledge, dsn-64" in shown
    assert "next: or rows without: --row triplet" in shown
    assert "training without" not in shown
    assert not (tmp_path / "study").exists()


def test_an_ablation_writes_its_table_and_resumes(data: Path, tmp_path: Path) -> None:
    tiny = [word for word in TINY if word not in LEFT_OPEN]
    words = ("train", str(data), *tiny, "--epochs", "1", "--ablation", "--out", "study")
    rows = ("--row", "triplet", "--seeds", "1")
    done = sbtk(*words, *rows, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run 1 of 1: triplet, seed 0" in done.stderr
    assert "| triplet | 1 |" in done.stdout
    assert (tmp_path / "study" / "ablation.csv").is_file()
    again = sbtk(*words, *rows, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "run 1 of 1" not in again.stderr
    assert again.stdout == done.stdout
    for_programs = sbtk(*words, *rows, "--json", cwd=tmp_path)
    assert for_programs.returncode == 0, for_programs.stderr
    assert for_programs.stdout == ""  # no epoch was trained, and the table is no JSON
