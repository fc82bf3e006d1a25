"""Tables put measured metrics in the right columns, and warn about different rules."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.protocol import CodeRule, Protocol
from sbtk_runtime.evaluation.report.comparison import compare
from sbtk_runtime.evaluation.report.results import MeasuredMap, read_measured
from sbtk_runtime.evaluation.report.table import (
    FORMATS,
    Cell,
    ReportTable,
    Row,
    format_percent,
    format_table,
)
from tests.tiny_results import report, write_results


@pytest.fixture
def run(tmp_path: Path) -> MeasuredMap:
    return made(tmp_path, Protocol(split="SK-YE"))


def made(folder: Path, rules: Protocol, **options: Any) -> MeasuredMap:
    of = f"21 unseen classes of {rules.split}"
    return read_measured(write_results(folder / "r.json", report(rules, of=of, **options)))[0]


def line(table: ReportTable, *stubs: str) -> list[str]:
    (row,) = [row for row in table.rows if row.stubs[: len(stubs)] == stubs]
    return [format_percent(cell) + cell.mark for cell in row.cells]


def test_table_2_is_the_papers(run: MeasuredMap) -> None:
    table = compare("table2", [])
    assert [(column.group[-7:-1], column.metric) for column in table.columns] == [
        ("(SK-SH", "mAP@all"),
        ("(SK-SH", "P@100"),
        ("(SK-YE", "mAP@200"),
        ("(SK-YE", "P@200"),
        ("TUB-SH", "mAP@all"),
        ("TUB-SH", "P@100"),
    ]
    assert len(table.rows) == 17
    assert line(table, "SAKE", "512") == ["54.7", "69.2", "49.7", "59.8", "47.5", "59.9"]
    assert line(table, "SAKE", "64 bits") == ["36.4", "48.7", "35.6", "47.7", "35.9", "48.1"]
    assert line(table, "PCMSN", "64") == ["52.3b", "61.6b", "-", "-", "42.4b", "51.7b"]
    assert line(table, "Doodle2Search") == ["-", "-", "46.1a", "37.0", "10.9b", "-"]
    assert line(table, "SBTKNet") == ["55.25c", "69.77c", "50.2", "59.6", "48.0c", "60.8c"]
    assert set(table.footnotes) == {"a", "b", "c"}


def test_a_result_is_shown_in_the_columns_of_its_split(run: MeasuredMap) -> None:
    table = compare("table2", [run])
    assert line(table, "student@0123 int8") == ["-", "-", "42.0", "33.33", "-", "-"]
    assert table.rows[-1].is_measured
    assert not any(row.is_measured for row in table.rows[:-1])
    assert "student@0123 int8 63.0" in table.footnotes["a"]


def test_results_of_one_model_on_two_splits_share_a_row(tmp_path: Path, run: MeasuredMap) -> None:
    other = made(tmp_path, Protocol(split="SK-SH"))
    assert line(compare("table2", [run, other]), "student@0123 int8")[:4] == [
        "51.0",
        "40.0",
        "42.0",
        "33.33",
    ]
    lines = [row for row in compare("table2", [run, run]).rows if row.is_measured]
    assert len(lines) == 2


def test_a_result_on_sem_pcycs_list_is_marked_as_another_test_set(tmp_path: Path) -> None:
    table = compare("table2", [made(tmp_path, Protocol(split="SK-SH-sempcyc"))])
    assert line(table, "student@0123 int8")[:2] == ["51.0b", "40.0b"]


def test_binary_codes_are_recognised_by_their_bits(tmp_path: Path) -> None:
    rules = Protocol(split="SK-YE", distance="hamming", codes=CodeRule(64))
    assert compare("table2", [made(tmp_path, rules)]).rows[-1].stubs[1] == "64 bits"


@pytest.mark.parametrize("setting", ["generalised-20", "generalised-all"])
def test_generalised_results_go_to_table_3(tmp_path: Path, setting: Any) -> None:
    run = made(tmp_path, Protocol(split="TUB-SH", setting=setting))
    table = compare("table3", [run])
    assert line(table, "student@0123 int8") == ["-", "-", "51.0", "40.0"]
    assert line(table, "SBTKNet") == ["51.45c", "57.2c", "33.4c", "49.4c"]
    assert any(f"{setting}: 525 queries against 530 photos" in text for text in table.warnings)
    assert any(text.endswith("generalised-20: SEM-PCYC") for text in table.warnings)
    with pytest.raises(BadData, match="none of 1 results fits table2"):
        compare("table2", [run])


def test_table_4_is_for_quickdraw(tmp_path: Path) -> None:
    table = compare("table4", [made(tmp_path, Protocol(split="QD-DE"))])
    assert line(table, "Doodle2Search") == ["7.52", "6.75"]
    assert line(table, "student@0123 int8") == ["51.0", "33.33"]


def test_later_work_is_shown_on_request() -> None:
    assert len(compare("table2", [], with_later=True).rows) > 30
    table = compare("table3", [], with_later=True)
    assert line(table, "SpLIP (CLIP B/32)") == ["-", "-", "66.7c", "70.3c", "68.2", "74.5"]
    later = {row.stubs[0]: row.stubs[2] for row in compare("table4", [], with_later=True).rows}
    assert later["SD-PL"] == "V"
    assert later["TLT"] == "S"


def test_a_result_that_fits_no_column_is_left_out_with_a_warning(run: MeasuredMap) -> None:
    photo = replace(run, is_sketch_query=False)
    table = compare("table2", [run, photo])
    assert sum(row.is_measured for row in table.rows) == 1
    assert any("photos as queries) has no column" in text for text in table.warnings)


def test_another_gallery_than_the_published_ones_is_a_warning(run: MeasuredMap) -> None:
    found = warnings_of(run)
    assert "different test set: 525 sketches against 530 photos; published: 12,694 against" in found
    whole = replace(run, queries=12_694, photos=12_553, has_duplicates=True)
    assert "another test set" not in warnings_of(whole)
    assert "duplicates; published" not in warnings_of(whole)


def test_a_gallery_without_duplicates_is_a_warning(run: MeasuredMap) -> None:
    bare = replace(run, queries=12_694, photos=10_453, has_duplicates=False)
    assert "gallery without duplicates; published with" in warnings_of(bare)
    assert "another test set" not in warnings_of(bare)


def test_other_classes_than_all_unseen_ones_are_a_warning(run: MeasuredMap) -> None:
    seen = replace(run, is_unseen=False, is_whole=False, of="10 validation classes")
    assert "measured on 10 validation classes, published rows on unseen classes" in warnings_of(
        seen
    )
    some = replace(run, is_whole=False, of="2 of 21 unseen classes of SK-YE")
    assert "measured on only 2 of 21 unseen classes of SK-YE" in warnings_of(some)


def test_the_rules_of_both_sides_are_printed(run: MeasuredMap) -> None:
    found = warnings_of(run)
    assert "mAP@200 by plain AP, mean over queries, strict divisor" in found
    assert "lenient: Doodle2Search, SketchGCN; strict: SAKE, SBTKNet" in found
    assert "plain AP: SEM-PCYC, Doodle2Search" in found
    assert "mean over classes: DSN" in " ".join(compare("table2", [run], with_later=True).warnings)
    assert "not a ranking" in found


def test_a_metric_by_lenient_rules_is_marked(run: MeasuredMap) -> None:
    lenient = replace(run, metrics={"mAP@200 (lenient)": 0.63})
    assert line(compare("table2", [lenient]), "student@0123 int8")[2:4] == ["63.0a", "-"]


def test_markdown_has_a_cell_for_every_column(run: MeasuredMap) -> None:
    table = compare("table2", [run])
    rows = [text for text in format_table(table, "markdown").splitlines() if text.startswith("|")]
    assert len(rows) == len(table.rows) + 2
    assert {row.count("|") for row in rows} == {len(table.columns) + len(table.stubs) + 1}
    assert "| **student@0123 int8** |" in rows[-1]
    assert "46.1<sup>a</sup>" in "".join(rows)


def test_csv_has_plain_numbers(run: MeasuredMap) -> None:
    rows = list(csv.DictReader(io.StringIO(format_table(compare("table2", [run]), "csv"))))
    assert rows[-1]["Sketchy Ext. (SK-YE) mAP@200"] == "42.0"
    assert rows[-1]["measured"] == "yes"
    assert rows[-1]["dim"] == "-"
    (doodle,) = [row for row in rows if row["method"] == "Doodle2Search"]
    assert "lenient" in doodle["remarks"]
    assert "the paper's Table 2" in doodle["remarks"]


def test_latex_rows_fit_their_columns_and_nothing_is_left_unescaped(run: MeasuredMap) -> None:
    odd = replace(run, name="a_b & 50% #1 {x}")
    text = format_table(compare("table2", [odd]), "latex")
    body = text[text.index(r"\begin{tabular}") : text.index(r"\end{tabular}")]
    rows = [row for row in body.splitlines() if row.endswith(r"\\") and "multicolumn" not in row]
    assert len(rows) == 19
    assert {row.replace(r"\&", "").count("&") for row in rows} == {8}
    assert r"\textbf{a\_b \& 50\% \#1 \{x\}}" in rows[-1]
    assert text.count("{") == text.count("}")
    assert r"46.1\textsuperscript{a}" in text


def test_names_of_models_do_not_break_markdown(run: MeasuredMap) -> None:
    odd = replace(run, name="a|b*c_d")
    assert r"**a\|b\*c\_d**" in format_table(compare("table2", [odd]), "markdown")


def test_every_format_shows_every_table(run: MeasuredMap) -> None:
    for form in FORMATS:
        for name in ("table2", "table3", "table4"):
            assert "SBTKNet" in format_table(compare(name, []), form)


def test_figures_are_printed_as_papers_do() -> None:
    cells = [Cell(50.2), Cell(55.25), Cell(57.2049), Cell(), Cell(51.26, 0.44)]
    assert [format_percent(cell) for cell in cells] == ["50.2", "55.25", "57.2", "-", "51.3 ± 0.4"]
    assert Row(("a",), ()).is_measured is False


def warnings_of(run: MeasuredMap) -> str:
    return "\n".join(compare("table2", [run]).warnings)
