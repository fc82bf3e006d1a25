"""`sbtk report`: tables and figures of results, from files of other commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbtk_cli.main import main
from sbtk_runtime.evaluation.protocol import Protocol
from sbtk_runtime.evaluation.report.ranked_sheet import RIGHT, WRONG
from tests.tiny_data import write_dataset
from tests.tiny_results import report, write_ablation, write_results

# Two classes are unseen in SK-YE, two are seen.
CLASSES = ("cow", "windmill", "airplane", "cat")
MODEL = ("--model", "tiny", "--threads", "1", "--engine", "onnxruntime")


@pytest.fixture
def data(workplace: Path) -> Path:
    return write_dataset(workplace / "data", CLASSES, sketches=3, photos=3)


@pytest.fixture
def results(workplace: Path) -> Path:
    return write_results(workplace / "results.json", report(Protocol(split="SK-YE")))


def test_report_reads_what_bench_map_writes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "map", "data", *MODEL, "--json"]) == 0
    text = capsys.readouterr().out
    Path("own.json").write_text(text)
    measured = json.loads(text)["map"][0]
    assert main(["report", "table2", "own.json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (line,) = [line for line in out.splitlines() if line.startswith("| **tiny")]
    # The gallery is smaller than 200, so there is no P@200.
    strict = measured["figures"]["mAP@200 (strict, VOC)"]
    cells = line.split(" | ")
    assert cells[5] == f"{100 * strict:.2f}".removesuffix("0")
    assert cells[6] == "-"
    assert "**Warning:** tiny" in out
    assert "measured on only 2 of 21 unseen classes of SK-YE" in out
    assert main(["report", "bars", "own.json", "-o", "bars.png"]) == 0
    assert Path("bars.png").read_bytes().startswith(b"\x89PNG")


def test_generalised_and_binary_results_go_to_their_tables(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(data, CLASSES, sketches=3, photos=5)
    for name, options in {
        "bits": ("--bits", "8"),
        "all": ("--setting", "generalised-all"),
    }.items():
        assert main(["bench", "map", "data", *MODEL, *options, "--json"]) == 0
        Path(f"{name}.json").write_text(capsys.readouterr().out)
    assert main(["report", "table2", "bits.json", "all.json"]) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if "int8** | 8 bits | here" in line]) == 1
    assert "2 of 21 unseen classes of SK-YE (generalised-all) has no column" in out
    assert main(["report", "table3", "all.json", "--later"]) == 0
    out = capsys.readouterr().out
    assert "generalised-all: 6 queries against 20 photos" in out
    assert len([line for line in out.splitlines() if "int8** | 16 | here" in line]) == 1


def test_a_table_in_a_file_keeps_its_warnings_on_the_terminal(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "table2", "results.json", "--format", "latex", "--out", "t.tex"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "warning: student@0123 int8: different test set" in err
    assert r"\begin{tabular}" in Path("t.tex").read_text()
    assert main(["report", "table2", "results.json", "-o", "t.tex", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_csv_goes_to_stdout_and_warnings_to_stderr(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "table2", "results.json", "--format", "csv", "--later"]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(out.splitlines()))
    assert rows[-1]["method"] == "student@0123 int8"
    assert "SpLIP (CLIP B/32)" in {row["method"] for row in rows}
    assert "not a ranking" in err


@pytest.mark.parametrize("name", ["table2", "table3", "table4", "table5"])
def test_every_table_is_printed_without_results(
    name: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", name]) == 0
    out = capsys.readouterr().out
    assert f"Table {name[-1]}" in out
    assert "| SBTKNet |" in out or "quad. + ID" in out


def test_a_result_of_another_table_is_refused(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "table4", "results.json"]) == 1
    assert "none of 1 results fits table4" in capsys.readouterr().err


def test_table_5_takes_ablations_and_single_results(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ablation(Path("ablation.csv"), {"triplet": [0.4, 0.5], "all": [0.6, 0.6]})
    assert main(["report", "table5", "ablation.csv", "results.json"]) == 0
    out = capsys.readouterr().out
    assert "| **triplet** | validation classes | 2 | 45.0 ± 7.1 |" in out
    assert "**student@0123 int8**" in out
    assert "have the paper's order by mAP@all" in out
    Path("ablation.csv").write_text("nothing")
    assert main(["report", "table5", "ablation.csv"]) == 1
    assert "has no column" in capsys.readouterr().err


def test_bars_require_metrics_by_class(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = report(Protocol())
    del bare["class_map"]
    write_results(Path("bare.json"), bare)
    assert main(["report", "bars", "bare.json", "-o", "bars.svg"]) == 1
    assert "no class_map in the result" in capsys.readouterr().err
    assert main(["report", "bars", "bare.json", "-o", "bars.doc"]) == 2
    assert "bars.doc" in capsys.readouterr().err
    Path("folder.png").mkdir()
    for command in (["bars", "bare.json"], ["map", "data"]):
        assert main(["report", *command, "-o", "folder.png"]) == 2
        assert "folder.png is not a file" in capsys.readouterr().err


def test_figure_3_shows_hits_zero_shot_and_generalised(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "figure3", "data", *MODEL, "-o", "f.png", "--random", "2"]) == 0
    assert "f.png: 5 hits for 2 sketches" in capsys.readouterr().err
    both = Image.open("f.png")
    assert main(["report", "figure3", "data", *MODEL, "-o", "g.png", "--no-generalised"]) == 0
    one = Image.open("g.png")
    assert both.width > 1.9 * one.width
    assert both.height < one.height  # four sketches by default
    colours = {colour for _, colour in both.convert("RGB").getcolors(1 << 20) or []}
    assert {RIGHT, WRONG} <= colours


def test_figure_4_shows_chosen_and_worst_sketches(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--query", "data/sketch/cow/0.png", "--query", "data/sketch/windmill/1.png"]
    assert main(["report", "figure4", "data", *MODEL, "-o", "named.png", *named, "-k", "3"]) == 0
    assert main(["report", "figure4", "data", *MODEL, "-o", "worst.png", "--worst", "2"]) == 0
    named_sheet, worst = Image.open("named.png"), Image.open("worst.png")
    assert named_sheet.height == worst.height
    assert named_sheet.width < worst.width
    # The same sketches give the same figure.
    assert main(["report", "figure4", "data", *MODEL, "-o", "again.png", "--worst", "2"]) == 0
    np.testing.assert_array_equal(np.asarray(worst), np.asarray(Image.open("again.png")))


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["-o", "f.jpg"], 2, "ends in .png"),
        (["-o", "nowhere/f.png"], 2, "does not exist"),
        (["-o", "f.png", "--worst", "1", "--random", "1"], 2, "Use only one of"),
        (["-o", "f.png", "--random", "99"], 2, "99 queries of 6"),
        (["-o", "f.png", "--worst", "99"], 2, "99 queries of 6"),
        (["-o", "f.png", "--query", "data/sketch/cat/0.png"], 1, "not among the 6 sketches"),
        (["-o", "f.png", "--query", "none.png"], 1, "not among the 6 sketches"),
    ],
)
def test_figures_that_cannot_be_drawn_say_why(
    data: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    complaint: str,
) -> None:
    assert main(["report", "figure4", "data", *MODEL, *arguments]) == code
    assert complaint in capsys.readouterr().err
    assert not Path("f.png").exists()


@pytest.mark.parametrize("name", ["table2", "table3", "table4", "table5", "bars"])
@pytest.mark.parametrize("kind", ["ablation.md", "empty.json", "cut.json", "folder"])
def test_other_files_than_results_are_refused_with_the_command_that_makes_them(
    workplace: Path, results: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    Path("ablation.md").write_text("| row | mAP |\n")
    Path("empty.json").touch()
    Path("cut.json").write_bytes(results.read_bytes()[:-9])
    Path("folder").mkdir()
    out = ["-o", "bars.png"] if name == "bars" else []
    assert main(["report", name, kind, *out]) == 1
    err = capsys.readouterr().err
    assert f"Error: {kind} " in err
    assert "expected: a file of 'sbtk bench map --json'" in err
    assert "next: sbtk bench map DATA --json > results.json" in err
    assert ("sbtk train DATA --ablation" in err) == (name == "table5")


def test_missing_data_and_missing_seen_photos_are_errors(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "figure3", *MODEL, "-o", "f.png"]) == 2
    assert "SBTK_DATA" in capsys.readouterr().err
    write_dataset(workplace / "unseen", ("cow",), sketches=2, photos=2)
    assert main(["report", "figure3", "unseen", *MODEL, "-o", "f.png"]) == 1
    assert "--no-generalised" in capsys.readouterr().err


def test_an_unreadable_photo_is_named_and_the_exit_code_is_3(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "photo" / "cow" / "bad.jpg").write_bytes(b"no image")
    assert main(["report", "figure4", "data", *MODEL, "-o", "f.png"]) == 3
    assert "bad.jpg" in capsys.readouterr().err
    assert Path("f.png").is_file()
    assert main(["report", "map", "data", *MODEL, "-o", "m.png", "--method", "pca"]) == 3


def test_a_map_is_drawn_and_its_coordinates_written(data: Path) -> None:
    arguments = ["map", "data", *MODEL, "-o", "m.svg", "--method", "pca", "--per-class", "2"]
    assert main(["report", *arguments]) == 0
    text = Path("m.svg").read_text()
    assert "<svg" in text
    with Path("m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["kind"], row["class"]) for row in rows}
    assert found == {(kind, name) for kind in ("sketch", "photo") for name in ("cow", "windmill")}
    assert len(rows) == 8
    assert len({(row["pca_x"], row["pca_y"]) for row in rows}) == 8
    assert main(["report", *arguments, "--coordinates", "other.csv"]) == 0
    assert Path("other.csv").read_text() == Path("m.csv").read_text()
