"""Results of ablations: reading, averaging over seeds, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.protocol import Protocol
from sbtk_runtime.evaluation.report.ablation import ablation_table, compute_spreads, read_ablation
from sbtk_runtime.evaluation.report.results import load_published, read_measured
from sbtk_runtime.evaluation.report.table import ReportTable, format_percent, format_table
from sbtk_train.runs.ablation import TABLE_5
from tests.tiny_results import report, write_ablation, write_results

IN_ORDER = {
    "triplet": [0.40, 0.42],
    "quadruplet": [0.44, 0.46],
    "all": [0.50, 0.52],
}


def test_the_papers_rows_have_sbtks_names() -> None:
    assert [row.name for row in load_published().ablation] == [row.name for row in TABLE_5]


def test_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    values = {"triplet": [0.4, 0.5, 0.6], "all": [0.7]}
    found = compute_spreads(read_ablation(write_ablation(tmp_path / "a.csv", values)))
    triplet = found["validation", "triplet"]["mAP@all"]
    assert triplet.mean == pytest.approx(0.5)
    assert triplet.deviation == pytest.approx(0.1)
    assert triplet.seeds == 3
    assert found["validation", "all"]["mAP@all"].deviation is None


def test_the_table_has_the_papers_rows_and_ours_below(tmp_path: Path) -> None:
    results = read_ablation(write_ablation(tmp_path / "a.csv", IN_ORDER | {"dsn-64": [0.1, 0.1]}))
    table = ablation_table(results)
    assert [row.stubs[:2] for row in table.rows[6:]] == [
        ("triplet", "validation classes"),
        ("quad.", "validation classes"),
        ("quad. + ID + know.", "validation classes"),
        ("dsn-64", "validation classes"),
    ]
    assert lines(table)[0] == ["47.7", "43.6", "55.1", "52.0"]
    assert lines(table)[6] == ["41.0 ± 1.4", "-", "-", "-"]
    assert table.rows[6].stubs[2] == "2"
    assert any("not of SK-YE's unseen classes" in warning for warning in table.warnings)
    assert "41.0 ± 1.4" in format_table(table, "markdown")
    assert r"41.0 $\pm$ 1.4" in format_table(table, "latex")
    assert "mAP@all spread" in format_table(table, "csv").splitlines()[0]


def test_tu_berlin_has_its_half_of_the_table() -> None:
    table = ablation_table([], split="TUB-SH")
    assert lines(table)[4] == ["48.0", "50.5", "60.8", "58.6"]


def test_the_papers_order_is_confirmed_or_not_with_numbers(tmp_path: Path) -> None:
    found = ablation_table(read_ablation(write_ablation(tmp_path / "a.csv", IN_ORDER)))
    assert "the rows have the paper's order by mAP@all" in " ".join(found.notes)
    turned = IN_ORDER | {"triplet": [0.47, 0.49]}
    found = ablation_table(read_ablation(write_ablation(tmp_path / "a.csv", turned)))
    (note,) = [note for note in found.notes if "not in the paper's order" in note]
    assert "1 of 3 pairs" in note
    assert note.endswith("triplet 48.0 over quad. 45.0")
    near = IN_ORDER | {"triplet": [0.40, 0.54]}
    found = ablation_table(read_ablation(write_ablation(tmp_path / "a.csv", near)))
    assert "triplet 47.0 over quad. 45.0 (within the spread)" in " ".join(found.notes)
    alone = IN_ORDER | {"triplet": [0.48]}
    found = ablation_table(read_ablation(write_ablation(tmp_path / "a.csv", alone)))
    assert "triplet 48.0 over quad. 45.0 (one seed: no spread)" in " ".join(found.notes)


def test_one_seed_gives_no_spread(tmp_path: Path) -> None:
    found = ablation_table(read_ablation(write_ablation(tmp_path / "a.csv", {"all": [0.5]})))
    assert lines(found)[6][0] == "50.0"
    assert any("one seed" in warning for warning in found.warnings)
    assert any("no two rows" in note for note in found.notes)


def test_single_results_are_listed_below(tmp_path: Path) -> None:
    runs = read_measured(write_results(tmp_path / "r.json", report(Protocol(split="SK-YE"))))
    table = ablation_table([], runs)
    assert lines(table)[6] == ["51.0", "42.0", "40.0", "33.33"]
    assert any("525 sketches against 530 photos" in warning for warning in table.warnings)
    other = ablation_table([], runs, split="TUB-SH")
    assert any("of SK-YE, not on TUB-SH" in warning for warning in other.warnings)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("value,other\n", "no column row, seed, figure"),
        ("row,seed,figure,value\nall,0,mAP@all,0.4", "is cut off"),
        ("row,seed,figure\n", "no column value"),
        ("row,seed,figure,value\n", "has no results"),
        ("row,seed,figure,value\nall,0,mAP@all,57.0\n", "line 2: the value is '57.0'"),
        ("row,seed,figure,value\nall,0,mAP@all,nan\n", "the value is 'nan'"),
        ("row,seed,figure,value\nall,0,mAP@all\n", "the value is ''"),
        ("row,seed,figure,value\n,0,mAP@all,0.5\n", "line 2: no row"),
        ("row,seed,figure,value\nall,0,P@10,0.5\nall,0,P@10,0.6\n", "two values of P@10"),
    ],
)
def test_files_without_an_ablation_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(text)
    with pytest.raises(BadData, match=complaint):
        read_ablation(file)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    file = write_ablation(tmp_path / "a.csv", {"all": [0.5]})
    known = read_ablation(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_ablation(file) == known


def test_texts_are_printed_on_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('row,seed,figure,value\n"a\nb",0,mAP@all,0.5\n')
    (result,) = read_ablation(file)
    assert result.row == r"a\nb"


def test_a_missing_file_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="cannot be read"):
        read_ablation(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe,")
    with pytest.raises(BadData, match="cannot be read"):
        read_ablation(tmp_path / "a.csv")


def lines(table: ReportTable) -> list[list[str]]:
    return [[format_percent(cell) for cell in row.cells] for row in table.rows]
