"""`sbtk train --config FILE --set KEY=VALUE`: precedence, refusals, and the record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sbtk_cli.main import main
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import sha256_of_file
from sbtk_train.compute import choose_compute
from sbtk_train.config import CONFIG_NAME, read_config, read_settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow_resnet18")]

TINY = """
    --weights none --backbone resnet18 --size 32 --final-epochs 0 --quadruplets 2 --dim 8
    --validation-classes 2 --precision fp32 --threads 1 --no-refit --quiet
""".split()  # noqa: SIM905


def test_a_resolved_configuration_trains_the_same_run_again(data: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    flags = [*TINY, "--epochs", "1", "--seed", "3", "--margin", "0.3"]
    assert main(["train", str(data), *flags, "--out", str(first)]) == 0
    resolved = first / CONFIG_NAME
    assert main(["train", "--config", str(resolved), "--quiet", "--out", str(again)]) == 0
    config = read_config(again)
    assert config.config_file == str(resolved)
    assert replace(config, config_file="", config_sha256="") == read_config(first)
    assert (again / "metrics.csv").read_text() == (first / "metrics.csv").read_text()
    record = json.loads((again / "run.json").read_text())
    assert record["config_file"] == {"file": CONFIG_NAME, "sha256": sha256_of_file(resolved)}


def test_an_option_wins_over_set_and_set_over_the_file_and_the_file_over_the_recipe(
    data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        f'data = "{data}"\nseed = 7\nheld_out_share = 0.1\n'
        "[recipe]\nepochs = 3\nmargin = 0.5\nweight_decay = 0.01\npatience = 2\n"
    )
    sets = ["--set", "recipe.epochs=2", "--set", "margin=0.4", "--set", "optimizer=sgd"]
    run = tmp_path / "run"
    words = ["train", *TINY, "--config", str(file), *sets, "--epochs", "1", "--out", str(run)]
    assert main(words) == 0
    config = read_config(run)
    recipe = vars(config.recipe)
    assert (config.data, config.seed, config.held_out_share) == (str(data), 7, 0.1)
    assert (recipe["epochs"], recipe["margin"], recipe["optimizer"]) == (1, 0.4, "sgd")
    assert (recipe["weight_decay"], recipe["patience"]) == (0.01, 2)
    assert (recipe["name"], recipe["metric"]) == ("sbtk", "contrastive")
    record = json.loads((run / "run.json").read_text())
    assert record["settings"] == ["recipe.epochs=2", "margin=0.4", "optimizer=sgd"]
    assert record["config_file"]["file"] == "mine.toml"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--set", "learning_rat=1e-3"], "unknown key 'learning_rat' expected: 'learning_rate'"),
        (["--set", "recipe.split=SK-SH"], "unknown key 'recipe.split'"),
        (["--set", "epochs"], "--set epochs expected: KEY=VALUE"),
        (["--set", "config_file=x"], "expected: KEY=VALUE"),
        (["--set", "epochs=many"], "epochs is 'many' expected: a whole number"),
        (["--set", "epochs=true"], "epochs is True expected: a whole number"),
        (["--set", "augment=1"], "augment is 1 expected: true or false"),
        (["--set", "optimizer=sgdd"], "optimizer is 'sgdd' expected: sgd, adam, adamw"),
        (["--set", "margin=5"], "margin is 5.0 expected: 0 to 4"),
        (["--set", "momentum=-1"], "momentum is -1.0 expected: 0 to 1"),
        (["--set", "batch_sketches=4"], "sbtknet has no setting 'batch_sketches'"),
        (["--seed", "-1"], "seed -1 expected: 0 to 2^63 - 1"),
        (["--seed", "99999999999999999999"], "expected: 0 to 2^63 - 1"),
        (["--set", "division_seed=-1"], "division seed -1 expected: 0 to 2^63 - 1"),
        (["--set", "checkpoint_minutes=nan"], "checkpoint_minutes is nan expected: 0 or more"),
        (["--set", "more_photos=here"], "more_photos is 'here' expected: a list of texts"),
        (["--config", "gone.toml"], "gone.toml cannot be read"),
        (["--config", "FILE"], "FILE: unknown key 'epoch' expected: 'epochs'"),
        (["--config", "PAPER", "--recipe", "sbtk"], "recipe sbtk with a --config file of recipe"),
        (["--config", "PAPER", "--set", "recipe=sbtk"], "recipe sbtk with a --config file of"),
        (["--config", "PAPER", "--resume", "run"], "leave out --config and --set"),
        (["--set", "epochs=2", "--resume", "run"], "leave out --config and --set"),
        (["--set", "metric=triplet", "--ablation"], "--metric with --ablation"),
        (["--config", "PAPER", "--ablation"], "--recipe with --ablation"),
    ],
)
def test_invalid_settings_are_refused(
    data: Path,
    tmp_path: Path,
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("epoch = 3\n")
    Path("PAPER").write_text('recipe = "paper"\n')
    resumed = "--resume" in words
    options = [] if resumed or "--ablation" in words else [*TINY, "--out", "new"]
    assert main(["train", str(data), *options, *words]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert sentence in shown
    assert not Path("new").exists()


def test_a_device_that_torch_knows_but_sbtk_does_not_is_refused() -> None:
    with pytest.raises(BadConfig, match="--device mps"):
        choose_compute("mps", "auto")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xef\xbb\xbfseed = 3\r\n[recipe]\r\nepochs = 1\r\n")
    settings = read_settings(file)
    assert (settings.fields, settings.recipe) == ({"seed": 3}, {"epochs": 1})


def test_help_shows_the_common_options_and_help_all_all_of_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert main(["train", "--help-all"]) == 0
    whole = capsys.readouterr().out
    for option in ("--config", "--set", "--recipe", "--epochs", "--resume", "--help-all"):
        assert f"{option} " in short
    for option in ("--kdneg", "--memory-size", "--freeze-until", "--no-identity"):
        assert option not in short
        assert option in whole
    assert short.count("\n  -") < 32
