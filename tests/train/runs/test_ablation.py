"""The ablation study: rows train, an interrupted study resumes, and results match the runs."""

from __future__ import annotations

import csv
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_train.config import RECIPES, TrainConfig, make_recipe
from sbtk_train.runs.ablation import (
    METRIC,
    OWN_OPTIMIZERS,
    ROWS,
    Score,
    Study,
    bits_metric_name,
    draw,
    find_missing,
    find_others,
    format_markdown,
    is_done,
    run_folder,
    run_study,
    score_runs,
    select_rows,
    summarise,
    write_csv,
)
from tests.tiny_data import CLASSES, write_dataset
from tests.train.runs.test_run import tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), (*CLASSES, "window"))


def study_of(data: Path, folder: Path, *rows: str) -> Study:
    base = replace(
        tiny_config(data),
        freeze_until="layer4",
        feature_folder=str(folder / "maps"),
        feature_variants=2,
        dim=8,
    )
    common: dict[str, object] = {
        "train_size_px": 32,
        "final_epochs": 0,
        "quadruplets": 2,
        "knowledge": False,
    }
    small = tuple(
        replace(row, dim=8, changes=row.changes | {"knowledge": False}) for row in select_rows(rows)
    )
    return Study(base, "sbtk", common, {"sbtknet": 1, "dsn": 1, "sake": 1}, (0, 1), small)


def test_rows_are_those_of_the_papers_and_the_methods_at_two_lengths() -> None:
    assert [row.name for row in ROWS[:6]] == [
        "triplet",
        "quadruplet",
        "quadruplet-identity",
        "quadruplet-knowledge",
        "all",
        "all-attention",
    ]
    assert {(row.method, row.dim) for row in ROWS} == {
        (method, dim) for method in ("sbtknet", "sake", "dsn") for dim in (64, 512)
    }
    assert select_rows([]) == ROWS
    with pytest.raises(BadConfig, match="no row 'everything'"):
        select_rows(["everything"])


def test_rows_with_their_own_optimiser_keep_that_of_their_recipe(tmp_path: Path) -> None:
    names = ("all", "sbtknet-own", "sake-512", "sake-own", "dsn-512", "dsn-own")
    common: dict[str, object] = {
        "optimizer": "adamw",
        "learning_rate": 0.5,
        "schedule": "cosine",
        "epoch_images": 96,
        "train_size_px": 32,
    }
    study = replace(study_of(tmp_path, tmp_path, "all"), rows=select_rows(names), common=common)
    rows = {row.name: row for row in study.rows}
    assert sorted(rows) == sorted(names)
    for name in names:
        recipe = study.config(rows[name], seed=0).recipe
        method = rows[name].method
        expected: tuple[object, ...] = ("adamw", 0.5, "cosine")
        if name.endswith("-own"):
            own = RECIPES[method]["paper" if method == "sbtknet" else f"{method}-sketchy"]
            expected = (own.optimizer, own.learning_rate, own.schedule)
        assert (recipe.optimizer, recipe.learning_rate, recipe.schedule) == expected
        assert (recipe.epoch_images, recipe.train_size_px) == (96, 32)


def test_all_methods_see_sketches_prepared_alike() -> None:
    base = TrainConfig("data", "SK-YE", make_recipe("sbtk"))
    every = (*ROWS, *OWN_OPTIMIZERS)
    for given in (None, True, False):
        common: dict[str, object] = {} if given is None else {"ink_crop": given}
        study = Study(base, "sbtk", common, {"sbtknet": 1, "dsn": 1, "sake": 1}, (0,), every)
        for row in every:
            assert study.config(row, 0).recipe.ink_crop == (given is not False), row.name


def test_a_single_run_has_a_mean_but_no_spread(tmp_path: Path) -> None:
    study = study_of(tmp_path, tmp_path, "triplet", "all")
    scores = [
        Score(row, seed, 1, "validation", METRIC, value)
        for row, seed, value in (("triplet", 0, 0.25), ("all", 0, 0.5), ("all", 1, 0.75))
    ]
    lines = format_markdown(study, scores).splitlines()
    assert lines[2:] == ["| triplet | 1 | 0.2500 |", "| all three losses | 2 | 0.6250 ± 0.1768 |"]


@pytest.mark.slow
def test_an_interrupted_study_resumes_and_finishes(data: Path, tmp_path: Path) -> None:
    study = study_of(data, tmp_path, "triplet", "all")
    asked = iter([False, True])
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path, lambda event: None, should_stop=lambda: next(asked))
    assert len(find_missing(study, tmp_path)) == 3
    first = run_folder(tmp_path, study.rows[0], 0) / "student.safetensors"
    written = first.stat().st_mtime_ns
    run_study(study, tmp_path, lambda event: None)
    assert find_missing(study, tmp_path) == []
    assert first.stat().st_mtime_ns == written
    assert not (first.parent / "last.safetensors").exists()
    assert is_done(first.parent)
    with pytest.raises(BadConfig, match=r"recipe\.epochs = 1"):
        run_study(replace(study, epochs={"sbtknet": 2}), tmp_path, lambda event: None)

    messages: list[str] = []
    scores = score_runs(study, tmp_path, "validation", messages.append)
    scores += score_runs(study, tmp_path, "unseen", messages.append)
    assert len([text for text in messages if text.startswith("measuring")]) == 8
    assert len((tmp_path / "unseen.log").read_text().splitlines()) == 4
    messages.clear()
    assert score_runs(study, tmp_path, "unseen", messages.append) == scores[len(scores) // 2 :]
    assert not messages, "a student must not be measured on unseen classes twice"

    (kept, _) = summarise(study, scores, "validation", METRIC)
    values = [
        s.value for s in scores if (s.row, s.classes, s.figure) == ("triplet", "validation", METRIC)
    ]
    assert kept.mean == pytest.approx(sum(values) / 2)
    assert kept.spread == pytest.approx(statistics.stdev(values))
    assert any(s.figure == bits_metric_name(8) for s in scores)
    write_csv(tmp_path / "ablation.csv", scores)
    with (tmp_path / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(scores)
    assert set(rows[0]) == {"row", "seed", "epochs", "classes", "figure", "value"}
    table = format_markdown(study, scores)
    assert "| all three losses | 2 | " in table
    assert f"{kept.mean:.4f} ± {kept.spread:.4f}" in table
    plot = draw(study, scores, tmp_path / "ablation.png")
    assert plot is not None
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert find_missing(study, tmp_path) == []


@pytest.mark.slow
def test_runs_on_changed_data_are_not_put_in_one_table(data: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(data, tmp_path / "own"))
    study = replace(study_of(own, tmp_path, "triplet"), seeds=(0,))
    run_study(study, tmp_path, lambda event: None)
    assert find_others(study, tmp_path) == []
    assert find_others(replace(study, seeds=(1,)), tmp_path) == ["triplet-seed0"]
    score_runs(study, tmp_path, "unseen", lambda text: None)
    added = [
        Path(shutil.copy(own / "photo" / name / "0.jpg", own / "photo" / name / "9.jpg"))
        for name in (*CLASSES, "window")
    ]
    with pytest.raises(BadData, match="other images than the unseen classes have now"):
        score_runs(study, tmp_path, "unseen", lambda text: None)
    with pytest.raises(BadData, match=r"seed1 was trained on other images than .*seed0"):
        run_study(replace(study, seeds=(0, 1)), tmp_path, lambda event: None)
    assert not is_done(tmp_path / "triplet-seed1")
    for path in added:
        path.unlink()
    assert score_runs(study, tmp_path, "unseen", lambda text: None)
