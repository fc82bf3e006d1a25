"""Protocols: rules in words and by name, SEM-PCYC's draw, photo queries, and errors."""

from __future__ import annotations

import itertools
import json
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

import sbtk_runtime
from sbtk_runtime.binary_codes import Itq, fit_itq
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.metrics import evaluate, evaluate_by, usual_measures
from sbtk_runtime.evaluation.protocol import (
    DIVISORS,
    CodeRule,
    Divisor,
    FittedOn,
    Labelled,
    Mean,
    Measure,
    Protocol,
    draw_seen,
    photo_queries,
)


def _rows(count: int, seed: int, dim: int = 16) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def _sides() -> tuple[Labelled, Labelled]:
    random = np.random.default_rng(0)
    return (
        Labelled(_rows(40, 1), random.integers(0, 4, 40)),
        Labelled(_rows(120, 2), random.integers(0, 4, 120)),
    )


def test_the_description_of_the_usual_protocol_has_not_changed() -> None:
    assert Protocol().ranking == "cosine of unit embeddings; equal scores in gallery order"
    assert Protocol().setting_words == ""


def test_every_rule_is_in_the_description() -> None:
    codes = CodeRule(64, "queries", "released", fitted_rows=525)
    protocol = Protocol(
        distance="hamming", ties="expected", keeps_duplicates=True, codes=codes, split="SK-SH"
    )
    assert protocol.ranking == (
        "Hamming distance of 64-bit codes by ITQ fitted on the 525 queries, each side centred on "
        "its own mean, rotation as released; expected value over all orders of equal scores; "
        "duplicate photos kept"
    )
    loaded = json.loads(json.dumps(protocol.to_json()))
    assert loaded["codes"] == {
        "bits": 64,
        "fitted_on": "queries",
        "rotation": "released",
        "fitted_rows": 525,
    }
    assert loaded["split"] == "SK-SH"
    words = {
        Protocol(distance="hamming", codes=CodeRule(64, on)).ranking
        for on in ("gallery", "training", "queries", "bundle")
    }
    assert len(words) == 4
    assert "Euclidean" in Protocol(distance="euclidean").ranking
    assert "20 %" in Protocol(setting="generalised-20").setting_words


def test_metrics_have_distinct_names_and_definitions() -> None:
    cuts: list[tuple[int | None, Divisor | None]] = [(None, None)]
    cuts += [(k, divisor) for k in (100, 200) for divisor in DIVISORS]
    means: tuple[Mean, ...] = get_args(Mean)
    measures = [
        Measure("AP", k, divisor, is_voc, mean)
        for (k, divisor), is_voc, mean in itertools.product(cuts, (False, True), means)
    ]
    measures += [Measure("P", k, mean=mean) for k in (10, 100) for mean in means]
    assert len({measure.name for measure in measures}) == len(measures)
    assert len({measure.definition for measure in measures}) == len(measures)


def test_metric_names_in_logs_have_not_changed() -> None:
    assert Measure("AP").name == "mAP@all"
    assert Measure("AP", is_voc=True).name == "mAP@all (VOC)"
    assert Measure("AP", mean="class").name == "mAP@all (class mean)"
    assert Measure("AP", 200, "strict").name == "mAP@200 (strict)"
    assert Measure("P", 100).name == "P@100"
    everything = Measure("AP", 200, "strict", is_voc=True, mean="class")
    assert everything.name == "mAP@200 (strict, VOC, class mean)"
    assert "min(200, R)" in everything.definition


def test_the_usual_metrics_cover_each_published_rule_once() -> None:
    names = [measure.name for measure in usual_measures((100, 200), (100,))]
    assert len(set(names)) == len(names)
    # SBTKNet and SAKE; DSN; doodle2search and SEM-PCYC; Eq. 7; DSN's P@100.
    assert {
        "mAP@200 (strict, VOC)",
        "mAP@all (VOC, class mean)",
        "mAP@200 (lenient)",
        "mAP@200 (literal)",
        "mAP@100 (strict)",
        "P@100 (class mean)",
    } <= set(names)


def test_rules_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(BadConfig, match="hamming distance of no binary codes"):
        Protocol(distance="hamming")
    with pytest.raises(BadConfig, match="cosine distance of 64-bit codes"):
        Protocol(codes=CodeRule())
    with pytest.raises(BadConfig, match="photos as queries"):
        Protocol(queries="photo", setting="generalised-20")


def test_the_draw_of_sem_pcyc_equals_that_of_its_code() -> None:
    sketches = [f"class{number % 7}/sketch{number:03}.png" for number in range(300)]
    photos = [f"class{number % 5}/photo{number:03}.jpg" for number in range(200)]
    found = draw_seen(sketches, photos, unseen_sketches=77, unseen_photos=54)
    # As in its test.py: numpy's generator, sketches before photos, 20 % rounded down.
    np.random.seed(0)
    files = np.array(sketches)[np.unique(sketches, return_index=True)[1]]
    expected = files[np.sort(np.random.choice(len(files), int(0.2 * 77), replace=False))]
    assert [sketches[row] for row in found.sketches] == expected.tolist()
    files = np.array(photos)[np.unique(photos, return_index=True)[1]]
    expected = files[np.sort(np.random.choice(len(files), int(0.2 * 54), replace=False))]
    assert [photos[row] for row in found.photos] == expected.tolist()
    assert (len(found.sketches), len(found.photos)) == (15, 10)


def test_after_a_draw_of_classes_the_draw_of_images_continues_its_sequence() -> None:
    names = [f"class/{number:04}" for number in range(500)]
    found = draw_seen(names, names, unseen_sketches=400, unseen_photos=400, split="SK-SH-sempcyc")
    np.random.seed(0)
    classes = np.array([f"{number:03}" for number in range(125)])
    training = np.random.choice(classes, 100, replace=False)
    np.random.choice(np.setdiff1d(classes, training), 12, replace=False)
    expected = np.sort(np.random.choice(500, 80, replace=False))
    assert found.sketches.tolist() == expected.tolist()
    other = draw_seen(names, names, unseen_sketches=400, unseen_photos=400)
    assert other.sketches.tolist() != expected.tolist()


def test_a_repeated_seen_file_is_drawn_once() -> None:
    names = ["a/1", "a/2", "a/1", "a/2", "b/3"]
    found = draw_seen(names, names, unseen_sketches=15, unseen_photos=10)
    assert found.sketches.tolist() == [0, 1, 4]
    assert len(set(found.photos.tolist())) == 2


def test_fewer_seen_images_than_the_draw_needs_are_named() -> None:
    with pytest.raises(BadData, match="2 photos of seen classes") as raised:
        draw_seen(["a/1", "a/2"], ["a/1", "a/2"], unseen_sketches=5, unseen_photos=15)
    assert "3, a fifth of the 15" in raised.value.expected


def test_the_first_ten_photos_of_each_class_are_the_queries() -> None:
    labels = np.array([0, 1] * 14 + [2] * 4)
    photos = Labelled(np.arange(len(labels), dtype=np.float32)[:, None], labels)
    queries, gallery = photo_queries(photos)
    # As SAKE's prepare_pbir_features: a class of four photos has none left for the gallery.
    assert queries.rows[:, 0].tolist() == [*range(20), 28, 29, 30, 31]
    assert gallery.rows[:, 0].tolist() == list(range(20, 28))
    assert (queries.labels == labels[queries.rows[:, 0].astype(int)]).all()


@pytest.mark.parametrize("counts", [(10, 4), (1,), ()])
def test_classes_without_photos_left_to_find_are_refused(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    with pytest.raises(BadData, match=f"no class has more than {max(counts, default=0)}") as caught:
        photo_queries(Labelled(_rows(len(labels), 0), labels))
    assert "at least 11 photos" in caught.value.expected
    assert "sketches" in caught.value.next_step


def test_without_codes_a_protocol_is_plain_evaluation() -> None:
    queries, gallery = _sides()
    found, rules = evaluate_by(Protocol(ties="expected"), queries, gallery)
    expected = evaluate(queries.rows, queries.labels, gallery.rows, gallery.labels, ties="expected")
    assert found.summary() == expected.summary()
    assert rules == Protocol(ties="expected")


@pytest.mark.parametrize("fitted_on", ["gallery", "training", "queries", "bundle"])
def test_codes_are_fitted_on_the_images_of_the_protocol(fitted_on: FittedOn) -> None:
    queries, gallery = _sides()
    training = _rows(60, 3)
    protocol = Protocol(distance="hamming", codes=CodeRule(8, fitted_on))
    learnt_on: NDArray[np.float32] | Itq | None = None
    if fitted_on in ("training", "bundle"):
        learnt_on = training if fitted_on == "training" else fit_itq(training, 8)
    found, rules = evaluate_by(protocol, queries, gallery, learnt_on=learnt_on)
    fitted = {"gallery": gallery.rows, "queries": queries.rows}.get(fitted_on, training)
    itq = fit_itq(fitted, 8)
    for_gallery = itq.centred_on(gallery.rows) if fitted_on == "queries" else itq
    expected = evaluate(
        itq.codes(queries.rows),
        queries.labels,
        for_gallery.codes(gallery.rows),
        gallery.labels,
        distance="hamming",
    )
    assert found.summary() == expected.summary()
    assert rules.codes is not None
    assert rules.codes.fitted_rows == (None if fitted_on == "bundle" else len(fitted))


@pytest.mark.parametrize(
    ("fitted_on", "learnt_on"),
    [("training", None), ("bundle", None), ("bundle", _rows(60, 3)), ("bundle", 16)],
)
def test_a_missing_itq_is_named(
    fitted_on: FittedOn, learnt_on: NDArray[np.float32] | int | None
) -> None:
    queries, gallery = _sides()
    protocol = Protocol(distance="hamming", codes=CodeRule(8, fitted_on))
    given: NDArray[np.float32] | Itq | None
    given = fit_itq(_rows(60, 3), learnt_on) if isinstance(learnt_on, int) else learnt_on
    with pytest.raises(BadConfig):
        evaluate_by(protocol, queries, gallery, learnt_on=given)


def test_the_released_rotation_gives_other_codes() -> None:
    queries, gallery = _sides()
    metrics = [
        evaluate_by(
            Protocol(distance="hamming", codes=CodeRule(8, "queries", rotation)), queries, gallery
        )[0].summary()["mAP@all"]
        for rotation in ("procrustes", "released")
    ]
    assert metrics[0] != metrics[1]


def test_protocols_can_be_imported_from_the_package() -> None:
    queries, gallery = _sides()
    rule = sbtk_runtime.CodeRule(8, "queries")
    protocol = sbtk_runtime.Protocol(distance="hamming", ties="expected", codes=rule)
    retrieval, rules = sbtk_runtime.evaluate_by(
        protocol,
        sbtk_runtime.Labelled(queries.rows, queries.labels),
        sbtk_runtime.Labelled(gallery.rows, gallery.labels),
        ap_cuts=(50,),
    )
    measure = sbtk_runtime.Measure("AP", 50, "lenient", mean="class")
    metric = retrieval.metrics([measure])["mAP@50 (lenient, class mean)"]
    assert 0 < metric < 1
    assert rules.codes == CodeRule(8, "queries", fitted_rows=40)
