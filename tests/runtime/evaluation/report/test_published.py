"""The published results are complete, state their sources, and equal the papers'."""

from __future__ import annotations

from collections import Counter

from sbtk_runtime.evaluation.report.measured import parse_measure
from sbtk_runtime.evaluation.report.published import PublishedRow, load_published
from sbtk_train.data.splits import split_names

KNOWN = load_published()


def test_every_row_names_its_rules_and_its_source() -> None:
    assert len(KNOWN.rows) > 100
    for row in KNOWN.rows:
        assert row.rules in KNOWN.rules, row
        assert row.source, row
        assert row.tag in ("P", "V", "S"), row
        assert row.later == (row.tag != "P"), row
        assert row.metrics, row


def test_metrics_are_percentages_with_known_names() -> None:
    for row in KNOWN.rows:
        for name, percent in row.metrics.items():
            assert parse_measure(name) is not None, name
            assert 0 < percent < 100, row


def test_no_row_is_repeated() -> None:
    keys = Counter((row.method, row.dim, row.binary, row.setting, row.split) for row in KNOWN.rows)
    assert keys.most_common(1)[0][1] == 1


def test_splits_are_known() -> None:
    assert {row.split for row in KNOWN.rows} == {"SK-SH", "SK-YE", "TUB-SH", "QD-DE"}
    assert {gallery.class_list for gallery in KNOWN.galleries} <= set(split_names())
    named = {row.class_list for row in KNOWN.rows} - {"", "random 30 classes of its own"}
    assert named <= set(split_names())


def test_the_papers_rows_are_those_that_it_prints() -> None:
    assert metrics("SBTKNet") == {
        ("zero-shot", "SK-SH"): [55.25, 69.77],
        ("zero-shot", "SK-YE"): [50.2, 72.24, 59.6],
        ("zero-shot", "TUB-SH"): [48.0, 60.8],
        ("zero-shot", "QD-DE"): [11.88, 16.65],
        ("generalised", "SK-SH"): [51.45, 57.20],
        ("generalised", "TUB-SH"): [33.4, 49.4],
    }


def test_the_papers_ablation_ends_with_the_metrics_of_its_other_tables() -> None:
    rows = {row.name: row.metrics for row in KNOWN.ablation}
    assert len(rows) == 6
    whole = rows["all"]
    assert [whole["SK-YE"][name] for name in ("mAP@200", "P@200")] == [50.2, 59.6]
    assert [whole["TUB-SH"][name] for name in ("mAP@all", "P@100")] == [48.0, 60.8]
    for row in rows.values():
        assert list(row) == ["SK-YE", "TUB-SH"]
        for values in row.values():
            assert list(values) == ["mAP@all", "mAP@200", "P@100", "P@200"]


def test_sakes_two_lengths_are_distinguished() -> None:
    sake = [row for row in KNOWN.rows if row.method == "SAKE" and row.split == "SK-YE"]
    assert {(row.dim, row.binary, row.metrics["mAP@200"]) for row in sake} == {
        (64, True, 35.6),
        (512, False, 49.7),
    }


def test_methods_on_other_class_lists_say_so() -> None:
    assert {one.class_list for one in rows_of("SEM-PCYC")} == {"SK-SH-sempcyc", "TUB-SH-sempcyc"}
    assert all(one.class_list == one.split for one in rows_of("SAKE"))


def rows_of(method: str) -> list[PublishedRow]:
    found = [row for row in KNOWN.rows if row.method == method]
    assert found
    return found


def metrics(method: str) -> dict[tuple[str, str], list[float]]:
    return {(row.setting, row.split): list(row.metrics.values()) for row in rows_of(method)}
