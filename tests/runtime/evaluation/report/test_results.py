"""Measured results are read with their rules, or rejected; published ones equal the papers'."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.protocol import DIVISORS, CodeRule, Mean, Measure, Protocol
from sbtk_runtime.evaluation.report.results import (
    PublishedRow,
    find_metric,
    load_published,
    parse_measure,
    read_measured,
    strip_rules,
)
from sbtk_train.data.splits import split_names
from tests.tiny_results import report, write_results

KNOWN = load_published()
MEANS: tuple[Mean, ...] = get_args(Mean)


def test_a_result_is_read_with_its_rules(tmp_path: Path) -> None:
    rules = Protocol(setting="generalised-20", keeps_duplicates=True, split="SK-SH")
    of = "25 unseen classes of SK-SH"
    (run,) = read_measured(write_results(tmp_path / "r.json", report(rules, of=of, dim=512)))
    assert run.of == of
    assert run.name == "student@0123 int8"
    assert (run.dim, run.bits, run.split) == (512, None, "SK-SH")
    assert run.is_generalised
    assert run.is_unseen
    assert run.is_whole
    assert run.has_duplicates
    assert (run.queries, run.photos) == (525, 530)
    assert run.metrics["mAP@all"] == 0.5


def test_binary_codes_and_validation_classes_are_recognised(tmp_path: Path) -> None:
    rules = Protocol(distance="hamming", codes=CodeRule(64), classes="validation", split="SK-YE")
    of = "10 validation classes (seen, held out)"
    (run,) = read_measured(write_results(tmp_path / "r.json", report(rules, of=of)))
    assert run.bits == 64
    assert not run.is_unseen
    assert not run.is_whole
    assert run.of == of


def test_the_rules_of_an_old_result_are_read_from_its_text(tmp_path: Path) -> None:
    old = report(None, of="2 of 21 unseen classes of SK-YE")
    (run,) = read_measured(write_results(tmp_path / "r.json", old))
    assert run.split == "SK-YE"
    assert run.is_unseen
    assert not run.is_whole
    assert run.setting == "zero-shot"
    assert run.has_duplicates is None


def test_every_precision_in_a_file_is_a_separate_result(tmp_path: Path) -> None:
    two = [report(Protocol(), precision=name) for name in ("int8", "fp32")]
    names = [run.name for run in read_measured(write_results(tmp_path / "r.json", *two))]
    assert names == ["student@0123 int8", "student@0123 fp32"]


def test_texts_are_on_one_line_without_escapes(tmp_path: Path) -> None:
    odd = report(Protocol(split="SK-YE\n"), of="2\x1b[31m") | {
        "model_id": "a\nb\ud800",
        "class_map": {"c\rd": 0.5},
    }
    (run,) = read_measured(write_results(tmp_path / "r.json", odd))
    assert run.name == r"a\nb\ud800 int8"
    assert (run.split, run.of, list(run.class_map)) == (r"SK-YE\n", r"2\x1b[31m", [r"c\rd"])
    assert run.protocol.isprintable()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is empty"),
        ("no json", "is not JSON"),
        ('{"map": [{"protocol": "x', "is not valid JSON"),
        ("[1]", "is a JSON list"),
        ('{"latency": {}}', "no measurement of mAP"),
        ('{"map": []}', "no measurement of mAP"),
        ('{"map": [3]}', "a measurement is a JSON int"),
        ('{"map": [{"protocol": "x"}]}', "model_id is None"),
    ],
)
def test_files_without_results_are_refused(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(BadData, match=complaint) as refused:
        read_measured(file)
    assert "sbtk bench map" in refused.value.next_step


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"figures": {"mAP@all": 57.0}}, "number from 0 to 1"),
        ({"figures": {"mAP@all": "much"}}, "'much'"),
        ({"figures": {"mAP@all": float("nan")}}, "nan"),
        ({"figures": {}}, "figures is {}"),
        ({"queries": -1}, "queries is -1"),
        ({"photos": None}, "photos is None"),
        ({"dim": "long"}, "dim is 'long'"),
        ({"rules": {"setting": "odd"}}, "a setting 'odd'"),
        ({"rules": 7}, "rules is 7"),
    ],
)
def test_impossible_results_are_refused(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(BadData, match=complaint):
        read_measured(write_results(tmp_path / "r.json", report(Protocol()) | change))


def test_a_missing_file_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="cannot be read"):
        read_measured(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadData, match="is not JSON"):
        read_measured(tmp_path / "bytes.json")


def test_every_metrics_name_identifies_it() -> None:
    measures = [
        *(Measure("AP", None, None, voc, mean) for voc in (False, True) for mean in MEANS),
        *(
            Measure("AP", 200, divisor, voc, mean)
            for divisor, voc, mean in itertools.product(DIVISORS, (False, True), MEANS)
        ),
        *(Measure("P", k, mean=mean) for k in (10, 100) for mean in MEANS),
    ]
    assert len({measure.name for measure in measures}) == len(measures)
    for measure in measures:
        assert parse_measure(measure.name) == measure
        assert strip_rules(measure) in ("mAP@all", "mAP@200", "P@10", "P@100")


@pytest.mark.parametrize(
    "name",
    ["recall@10", "mAP", "mAP@all (64 bits)", "P@x", "mAP@200 (VOC,)", f"P@{'1' * 5000}"],
    ids=lambda name: name[:20],
)
def test_other_names_are_not_metrics(name: str) -> None:
    assert parse_measure(name) is None


def test_the_metric_by_rules_nearest_to_the_paper_is_chosen() -> None:
    names = ["mAP@all", "mAP@all (VOC)", "mAP@all (class mean)", "mAP@200 (lenient)"]
    assert find_metric(names, "mAP@all") == ("mAP@all (VOC)", Measure("AP", is_voc=True))
    assert find_metric(names, "mAP@200") == ("mAP@200 (lenient)", Measure("AP", 200, "lenient"))
    names.append("mAP@200 (strict)")
    assert find_metric(names, "mAP@200") == ("mAP@200 (strict)", Measure("AP", 200, "strict"))
    assert find_metric(names, "P@100") is None


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
