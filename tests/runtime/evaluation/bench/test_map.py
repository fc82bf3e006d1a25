"""mAP of a bundle on labelled images, compared with metrics of its embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from sbtk_runtime.binary_codes import fit_itq
from sbtk_runtime.bundle import OnnxForm
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig, BadData, BadModel, SbtkError
from sbtk_runtime.evaluation.bench.map import (
    LabelledImages,
    append_log,
    find_earlier_runs,
    measure_map,
)
from sbtk_runtime.evaluation.metrics import Embeddings, evaluate
from sbtk_runtime.evaluation.protocol import CodeRule, Protocol
from sbtk_runtime.files import sha256_of_file
from sbtk_runtime.preprocess import Kind
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet
from tests.tiny import tiny_bundle, tiny_model, write_tiny_manifest
from tests.tiny_data import write_dataset


@pytest.fixture
def embedder(tmp_path: Path) -> Iterator[Embedder]:
    with Embedder(tiny_bundle(tmp_path / "bundle"), engine="onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return read_dataset(write_dataset(tmp_path / "data"))


def sketches_of(images: ImageSet) -> LabelledImages:
    return LabelledImages(images.sketch_files, images.sketch_labels.tolist(), images.classes)


def photos_of(images: ImageSet) -> LabelledImages:
    return LabelledImages(images.photos, images.photo_labels.tolist(), images.classes)


def test_metrics_equal_scikit_learn_on_the_same_embeddings(
    embedder: Embedder, images: ImageSet
) -> None:
    from sklearn.metrics import average_precision_score

    report = measure_map(embedder, sketches_of(images), photos_of(images), of="6 classes")
    queries = [embedder.embed_one(path.read_bytes(), "sketch")[0] for path in images.sketch_files]
    gallery = [embedder.embed_one(path.read_bytes(), "photo")[0] for path in images.photos]
    scores = np.stack(queries) @ np.stack(gallery).T
    expected = [
        average_precision_score(images.photo_labels == label, row)
        for label, row in zip(images.sketch_labels, scores, strict=True)
    ]
    assert report.metrics["mAP@all"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert set(report.class_map) == set(images.classes)
    assert report.class_map["ball"] == pytest.approx(
        np.mean(np.asarray(expected)[images.sketch_labels == images.classes.index("ball")]),
        abs=1e-6,
    )
    assert (report.queries, report.photos, report.unreadable) == (24, 24, ())
    assert report.protocol.startswith("6 classes: 24 sketches against 24 photos; cosine")


def test_every_metric_has_a_definition(embedder: Embedder, images: ImageSet) -> None:
    report = measure_map(embedder, sketches_of(images), photos_of(images), of="6 classes")
    found = json.loads(json.dumps(report.to_json()))
    assert set(found["definitions"]) == set(found["figures"])
    assert found["ranking"] == "cosine of unit embeddings; equal scores in gallery order"
    assert found["images_per_s"] > 0


def test_every_metric_has_its_rules(embedder: Embedder, images: ImageSet) -> None:
    report = measure_map(
        embedder,
        sketches_of(images),
        photos_of(images),
        of="6 classes",
        protocol=Protocol(distance="hamming", ties="expected", codes=CodeRule(8)),
        ap_cuts=(5,),
        precision_cuts=(5, 500),
    )
    found = json.loads(json.dumps(report.to_json()))
    assert found["rules"] == {
        "queries": "sketch",
        "setting": "zero-shot",
        "distance": "hamming",
        "ties": "expected",
        "keeps_duplicates": False,
        "codes": {
            "bits": 8,
            "fitted_on": "gallery",
            "rotation": "procrustes",
            "fitted_rows": 24,
        },
        "split": "",
        "classes": "unseen",
        "rerank": "none",
    }
    assert set(found["figure_rules"]) == set(found["figures"])
    assert found["figure_rules"]["mAP@5 (strict)"] == {
        "kind": "AP",
        "cut": 5,
        "divisor": "strict",
        "is_voc": False,
        "mean": "query",
    }
    assert found["dim"] == 16
    # There is no envelope of expected values, and no precision beyond the gallery.
    assert not any("VOC" in name or "500" in name for name in found["figures"])
    assert "8-bit codes by ITQ fitted on the 24 photos of the gallery" in report.protocol


def test_codes_are_made_from_the_embeddings_that_are_measured_without_codes(
    embedder: Embedder, images: ImageSet
) -> None:
    def rows(paths: Sequence[Path], kind: Kind) -> Embeddings:
        return np.stack([embedder.embed_one(path.read_bytes(), kind)[0] for path in paths])

    sketches, photos = rows(images.sketch_files, "sketch"), rows(images.photos, "photo")
    both = np.concatenate([sketches, photos])
    for fitted_on, itq in {
        "training": fit_itq(both, 8),
        "queries": fit_itq(sketches, 8),
    }.items():
        rule = CodeRule(8, "training" if fitted_on == "training" else "queries")
        report = measure_map(
            embedder,
            sketches_of(images),
            photos_of(images),
            of="x",
            protocol=Protocol(distance="hamming", codes=rule),
            learnt_on=(sketches_of(images), photos_of(images)),
        )
        of_photos = itq if fitted_on == "training" else itq.centred_on(photos)
        expected = evaluate(
            itq.codes(sketches),
            images.sketch_labels,
            of_photos.codes(photos),
            images.photo_labels,
            distance="hamming",
        )
        assert report.metrics["mAP@all"] == pytest.approx(expected.ap_all.mean())
        assert report.embedded == (96 if fitted_on == "training" else 48)


def test_photo_queries_search_other_photos_and_embed_no_sketch(
    embedder: Embedder, tmp_path: Path
) -> None:
    images = read_dataset(write_dataset(tmp_path / "many", sketches=1, photos=13))
    report = measure_map(
        embedder,
        LabelledImages([tmp_path / "nowhere.png"], [0], images.classes),
        photos_of(images),
        of="6 classes",
        protocol=Protocol(queries="photo"),
    )
    assert (report.queries, report.photos, report.embedded) == (60, 18, 78)
    assert report.protocol.startswith("6 classes: 60 photos against 18 photos; cosine")
    rows = np.stack([embedder.embed_one(p.read_bytes(), "photo")[0] for p in images.photos])
    is_query = np.tile(np.arange(13) < 10, 6)
    labels = images.photo_labels
    expected = evaluate(rows[is_query], labels[is_query], rows[~is_query], labels[~is_query])
    assert report.metrics["mAP@all"] == pytest.approx(expected.ap_all.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("codes", "error", "found"),
    [
        (CodeRule(64), BadConfig, "64 bits"),
        (CodeRule(8, "bundle"), BadModel, "8-bit codes"),
        (CodeRule(8, "training"), BadData, "no images of seen classes"),
    ],
)
def test_impossible_codes_are_refused_before_anything_is_embedded(
    embedder: Embedder, images: ImageSet, codes: CodeRule, error: type[SbtkError], found: str
) -> None:
    done: list[int] = []
    with pytest.raises(error, match=found):
        measure_map(
            embedder,
            sketches_of(images),
            photos_of(images),
            of="x",
            protocol=Protocol(distance="hamming", codes=codes),
            progress=lambda count, total: done.append(count),
        )
    assert done == []


def test_unreadable_images_are_skipped_and_named_without_shifting_labels(
    embedder: Embedder, images: ImageSet
) -> None:
    whole = measure_map(embedder, sketches_of(images), photos_of(images), of="x")
    bad = images.photos[0].with_name("-bad.jpg")
    bad.write_bytes(b"no image")
    photos = LabelledImages(
        (bad, *images.photos), [3, *images.photo_labels.tolist()], images.classes
    )
    report = measure_map(embedder, sketches_of(images), photos, of="x")
    assert report.metrics == whole.metrics
    assert len(report.unreadable) == 1
    assert report.unreadable[0].startswith(f"{bad}: ")


def test_sketches_without_a_photo_of_their_class_are_counted(
    embedder: Embedder, images: ImageSet
) -> None:
    is_kept = images.photo_labels != images.classes.index("arch")
    photos = LabelledImages(
        [path for path, keep in zip(images.photos, is_kept, strict=True) if keep],
        images.photo_labels[is_kept].tolist(),
        images.classes,
    )
    report = measure_map(embedder, sketches_of(images), photos, of="x")
    assert report.unanswerable == 4
    assert "arch" not in report.class_map


def test_having_no_readable_image_is_an_error(embedder: Embedder, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    images = LabelledImages([bad, bad], [0, 1], ["bad", "worse"])
    with pytest.raises(BadData, match="none of 2 sketch files can be read"):
        measure_map(embedder, images, images, of="x")


def test_the_log_keeps_a_line_for_each_run(
    embedder: Embedder, images: ImageSet, tmp_path: Path
) -> None:
    report = measure_map(
        embedder, sketches_of(images), photos_of(images), of="6 unseen\tclasses\nof X"
    )
    log = tmp_path / "unseen.log"
    assert find_earlier_runs(log, report.model_sha256) == []
    append_log(log, report)
    append_log(log, report)
    lines = [line for line in log.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    _, bundle, sha256, protocol, metric = lines[0].split("\t")
    assert bundle == embedder.model_id
    assert sha256 == sha256_of_file(embedder.bundle.onnx_path("int8"))
    assert protocol.startswith("6 unseen classes of X: 24 sketches against 24 photos")
    assert protocol.endswith("onnxruntime int8")
    assert metric == f"mAP@all {report.metrics['mAP@all']:.4f}"
    assert find_earlier_runs(log, report.model_sha256) == lines
    assert find_earlier_runs(log, "0" * 64) == []


def test_the_hash_is_that_of_the_file_that_the_engine_runs(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "both")
    trt = folder / "model.int8.trt.onnx"
    trt.write_bytes(tiny_model(seed=1).SerializeToString())
    write_tiny_manifest(folder)
    images = read_dataset(write_dataset(tmp_path / "data", sketches=1, photos=1))
    hashes = {}
    with Embedder(folder, engine="onnxruntime", precision="int8", threads=1) as embedder:
        for form in get_args(OnnxForm):
            embedder.engine.info = replace(embedder.engine.info, form=form)
            report = measure_map(embedder, sketches_of(images), photos_of(images), of="x")
            hashes[form] = report.model_sha256
    assert hashes == {
        "plain": sha256_of_file(folder / "model.int8.onnx"),
        "tensorrt": sha256_of_file(trt),
    }


def test_progress_counts_sketches_and_photos(embedder: Embedder, images: ImageSet) -> None:
    seen: list[tuple[int, int | None]] = []
    measure_map(
        embedder,
        sketches_of(images),
        photos_of(images),
        of="x",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 48) for done in range(1, 49)]
