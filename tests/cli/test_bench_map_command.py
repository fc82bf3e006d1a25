"""`sbtk bench map` by every protocol: images, output and errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
from PIL import Image

from sbtk_cli.bench import map_command
from sbtk_cli.bench_data import load_labelled_set
from sbtk_cli.main import main
from sbtk_runtime.binary_codes import Rotation, fit_itq
from sbtk_runtime.evaluation.protocol import Distance, FittedOn, Protocol, QueryKind, Setting, Ties
from sbtk_runtime.files import sha256_of_file
from sbtk_runtime.manifest import FileRecord, read_bundle_manifest
from tests.tiny_data import write_dataset

# Two classes are unseen in SK-YE, three are seen.
CLASSES = ("cow", "windmill", "airplane", "cat", "duck")
UNSEEN = ("cow", "windmill")

Answer = Callable[..., dict[str, Any]]


@pytest.fixture
def data(workplace: Path) -> Path:
    return write_dataset(workplace / "data", CLASSES, sketches=6, photos=8)


@pytest.fixture
def measured(data: Path, capsys: pytest.CaptureFixture[str]) -> Answer:
    """Return a function that runs `sbtk bench map data` with options and returns its report."""

    def answer(*options: str) -> dict[str, Any]:
        command = ["bench", "map", "data", "--model", "tiny", "--threads", "1", "--json"]
        assert main([*command, *options]) == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)["map"][0]
        return report

    return answer


def test_without_options_the_default_protocol_is_used_and_printed(measured: Answer) -> None:
    report = measured()
    assert report["protocol"] == (
        "2 of 21 unseen classes of SK-YE: 12 sketches against 16 photos; "
        "cosine of unit embeddings; equal scores in gallery order"
    )
    assert report["rules"] == {
        "queries": "sketch",
        "setting": "zero-shot",
        "distance": "cosine",
        "ties": "index",
        "keeps_duplicates": False,
        "codes": None,
        "split": "SK-YE",
        "classes": "unseen",
        "rerank": "none",
    }
    assert set(report["figure_rules"]) == set(report["figures"]) == set(report["definitions"])


def test_generalised_20_adds_seen_images_to_queries_and_gallery(
    measured: Answer, data: Path
) -> None:
    report = measured("--setting", "generalised-20")
    # The two drawn sketches are of classes of which no photo was drawn.
    assert (report["queries"], report["unanswerable"], report["photos"]) == (12, 2, 16 + 3)
    assert "generalised, 20 % more" in report["protocol"]
    assert report["protocol"].startswith("2 of 21 unseen classes of SK-YE (")
    chosen = load_labelled_set(
        data,
        read_bundle_manifest(Path("bundles/tiny")),
        None,
        "unseen",
        Protocol(setting="generalised-20"),
    )
    # The steps of SEM-PCYC's code: unique names, numpy seed 0, sketches first, seen images first.
    np.random.seed(0)
    for images, kind, unseen, suffix in (
        (chosen.sketches, "sketch", 12, "png"),
        (chosen.photos, "photo", 16, "jpg"),
    ):
        files = np.unique(
            [f"{path.parent.name}/{path.name}" for path in (data / kind).glob(f"*/*.{suffix}")]
        )
        files = np.array([file for file in files if file.split("/")[0] not in UNSEEN])
        drawn = files[np.sort(np.random.choice(len(files), int(0.2 * unseen), replace=False))]
        names = [f"{path.parent.name}/{path.name}" for path in images.paths]
        assert names[: len(drawn)] == drawn.tolist()
        assert all(name.split("/")[0] in UNSEEN for name in names[len(drawn) :])
        for path, label in zip(images.paths, images.labels, strict=True):
            assert images.classes[label] == path.parent.name


def test_generalised_all_searches_for_unseen_classes_in_all_photos(measured: Answer) -> None:
    report = measured("--setting", "generalised-all")
    assert (report["queries"], report["photos"]) == (12, 40)
    assert set(report["class_map"]) == set(UNSEEN)
    assert report["figures"]["mAP@all"] < measured()["figures"]["mAP@all"]


def test_the_models_unseen_classes_are_never_used_as_seen(
    data: Path, measured: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path("bundles/tiny")
    training = {
        "split": {"name": "mine.txt"},
        "unseen_classes": ["cow", "windmill", "cat"],
        "validation_classes": ["duck"],
    }
    dataclasses.replace(read_bundle_manifest(bundle), training=training).write(bundle)
    report = measured("--classes", "validation", "--setting", "generalised-all")
    assert (report["queries"], report["photos"]) == (6, 8 + 8)
    assert report["rules"]["split"] == "mine.txt"
    assert report["rules"]["classes"] == "validation"
    chosen = load_labelled_set(
        data,
        read_bundle_manifest(bundle),
        "SK-YE",
        "unseen",
        Protocol(setting="generalised-all"),
    )
    assert {path.parent.name for path in chosen.photos.paths} == {*UNSEEN, "airplane", "duck"}
    assert chosen.learnt_on is not None
    for images in chosen.learnt_on:
        assert {path.parent.name for path in images.paths} == {"airplane"}


def test_photos_can_be_queries(measured: Answer, data: Path) -> None:
    write_dataset(data, UNSEEN, sketches=0, photos=14)
    report = measured("--queries", "photo")
    assert (report["queries"], report["photos"]) == (20, 8)
    assert "20 photos against 8 photos" in report["protocol"]


@pytest.mark.parametrize("fitted_on", get_args(FittedOn))
def test_codes_are_reported_with_what_itq_was_fitted_on(
    measured: Answer, fitted_on: FittedOn
) -> None:
    if fitted_on == "bundle":
        _give_itq(Path("bundles/tiny"))
    report = measured("--bits", "8", "--itq-on", fitted_on)
    codes = report["rules"]["codes"]
    fitted = {"gallery": 16, "queries": 12, "training": 3 * 14, "bundle": None}[fitted_on]
    assert codes == {
        "bits": 8,
        "fitted_on": fitted_on,
        "rotation": "procrustes",
        "fitted_rows": fitted,
    }
    assert report["rules"]["distance"] == "hamming"
    assert "Hamming distance of 8-bit codes" in report["protocol"]
    assert report["dim"] == 16


def test_ties_distance_and_ranks_follow_the_options_and_are_printed(
    measured: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    report = measured("--ties", "expected", "--distance", "euclidean", "--at", "4,500")
    assert report["rules"]["ties"] == "expected"
    assert report["rules"]["distance"] == "euclidean"
    assert {"mAP@4 (strict)", "P@4", "mAP@500 (lenient)"} <= set(report["figures"])
    assert not any("VOC" in name or name.startswith("P@500") for name in report["figures"])
    assert report["figures"]["mAP@all"] == pytest.approx(measured()["figures"]["mAP@all"])
    arguments = ["bench", "map", "data", "--model", "tiny", "--ties", "expected", "--at", "500"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "no P@500: the gallery has only 16 photos" in err
    assert "no VOC metrics" in err
    assert "expected value over all orders of equal scores" in " ".join(out.split())


def test_duplicates_count_only_with_keep_duplicates(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = workplace / "Sketchy"
    write_dataset(workplace / "plain", CLASSES, sketches=2, photos=3)
    shutil.move(workplace / "plain" / "sketch", root / "sketch" / "tx_000000000000")
    shutil.copytree(workplace / "plain" / "photo", root / "extended_photo")
    shutil.move(workplace / "plain" / "photo", root / "photo" / "tx_000000000000")
    for name in CLASSES:
        image = Image.new("RGB", (64, 64), (200, 30, len(name)))
        image.save(root / "extended_photo" / name / "ext_9.jpg")
    counts = {}
    for option in ((), ("--keep-duplicates",)):
        command = ["bench", "map", "Sketchy", "--model", "tiny", "--threads", "1", "--json"]
        assert main([*command, *option]) == 0
        report = json.loads(capsys.readouterr().out)["map"][0]
        counts[report["rules"]["keeps_duplicates"]] = report["photos"]
        assert ("duplicate photos kept" in report["protocol"]) == bool(option)
    assert counts == {False: 2 * 4, True: 2 * 7}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--itq-on", "queries"], 2, "--itq-on without --bits"),
        (["--itq-rotation", "released"], 2, "--itq-rotation without --bits"),
        (["--bits", "8", "--distance", "cosine"], 2, "--distance cosine with --bits 8"),
        (
            ["--bits", "8", "--itq-on", "bundle", "--itq-rotation", "released"],
            2,
            "the bundle has its own",
        ),
        (["--bits", "12"], 2, "binary codes of 12 bits"),
        (["--bits", "64"], 2, "between 8 and the embedding's width, 16"),
        (["--bits", "8", "--itq-on", "bundle"], 1, "has no 8-bit codes"),
        (["--queries", "photo", "--setting", "generalised-all"], 2, "photos as queries"),
        (["--classes", "validation", "--split", "SK-YE"], 2, "--split SK-YE with --classes"),
        (["--at", "0"], 2, "is not a number from 1"),
        (["--at", "9" * 5000], 2, "is not a number from 1"),
    ],
)
def test_contradictory_protocol_options_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str
) -> None:
    assert main(["bench", "map", "data", "--model", "tiny", *options]) == code
    err = capsys.readouterr().err
    assert said in " ".join(err.split())
    assert "Traceback" not in err


def test_photo_queries_that_leave_no_gallery_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "map", "data", "--model", "tiny", "--queries", "photo"]
    for codes in ([], ["--bits", "8", "--itq-on", "gallery"]):
        assert main([*command, *codes]) == 1
        err = capsys.readouterr().err
        assert "at most 8 photos in each of 2 of 21 unseen classes of SK-YE" in err
        assert "more than 10" in err
        assert "Warning" not in err


@pytest.mark.parametrize("command", [["bench", "map"], ["report", "figure4", "-o", "sheet.png"]])
def test_photos_of_one_class_have_no_figure(
    workplace: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    write_dataset(workplace / "one", ["cow"], sketches=3, photos=3)
    assert main([*command, "one", "--model", "tiny"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "all 3 photos are of the class cow: mAP is 1 whatever their order" in err
    assert not Path("sheet.png").exists()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("sketch", [], "all 12 queries have the same embedding"),
        ("photo", [], "all 16 photos have the same embedding"),
        ("photo", ["--bits", "8", "--itq-on", "queries"], "all 16 photos have the same code"),
    ],
)
def test_images_that_are_all_the_same_have_no_figure(
    workplace: Path, capsys: pytest.CaptureFixture[str], kind: str, options: list[str], said: str
) -> None:
    data = write_dataset(workplace / "data", UNSEEN, sketches=6, photos=8)
    first, *others = sorted((data / kind).glob("*/*"))
    for other in others:
        other.write_bytes(first.read_bytes())
    assert main(["bench", "map", "data", "--model", "tiny", "--threads", "1", *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_sketches_without_a_photo_are_no_queries_and_make_the_exit_code_3(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(data, (*UNSEEN, "bat", "mouse"), sketches=6, photos=8)
    shutil.rmtree(data / "photo" / "bat")
    shutil.rmtree(data / "sketch" / "mouse")
    command = ["bench", "map", "data", "--model", "tiny", "--threads", "1", "--json"]
    assert main(command) == 3
    out, err = capsys.readouterr()
    report = json.loads(out)["map"][0]
    assert (report["queries"], report["unanswerable"]) == (12, 6)
    assert "4 of 21 unseen classes of SK-YE: 12 sketches against 24 photos" in report["protocol"]
    assert "no photos of bat: their sketches are left out" in err
    assert "6 sketches without a photo of their class left out" in err
    assert "no sketches of mouse: in the gallery, but not queried" in err
    shutil.rmtree(data / "photo" / "cow")
    shutil.rmtree(data / "sketch" / "windmill")
    assert main(command) == 1
    assert "no query has a photo of its class" in capsys.readouterr().err


def test_too_few_seen_images_and_missing_training_images_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(workplace / "unseen", UNSEEN, sketches=6, photos=6)
    command = ["bench", "map", "unseen", "--model", "tiny"]
    assert main([*command, "--setting", "generalised-20"]) == 1
    assert "0 sketches of seen classes" in capsys.readouterr().err
    assert main([*command, "--bits", "8", "--itq-on", "training"]) == 1
    assert "no images of seen classes to fit ITQ on" in capsys.readouterr().err


def test_the_log_names_the_protocol(measured: Answer, workplace: Path) -> None:
    measured("--bits", "8", "--ties", "expected", "--log", "unseen.log")
    line = (workplace / "unseen.log").read_text().splitlines()[-1]
    assert "8-bit codes by ITQ fitted on the 16 photos of the gallery; expected value" in line
    assert "\tmAP@all 0." in line


def test_the_choices_of_options_are_those_of_protocols() -> None:
    offered = {
        option.name: tuple(option.type.choices)
        for option in map_command.params
        if isinstance(option.type, click.Choice)
    }
    known = {
        "queries": QueryKind,
        "setting": Setting,
        "ties": Ties,
        "itq_on": FittedOn,
        "itq_rotation": Rotation,
    }
    for name, values in known.items():
        assert offered[name] == get_args(values)
    assert {*offered["distance"], "hamming"} == set(get_args(Distance))


def _give_itq(bundle: Path) -> None:
    """Add an ITQ of 8 bits to a bundle."""
    rows = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    path = bundle / "itq8.npz"
    path.write_bytes(fit_itq(rows, 8).to_bytes())
    manifest = read_bundle_manifest(bundle)
    record = FileRecord(sha256_of_file(path), path.stat().st_size)
    dataclasses.replace(manifest, files={**manifest.files, path.name: record}).write(bundle)
