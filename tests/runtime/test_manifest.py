"""Manifests survive JSON, and hostile ones are refused with a reason."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from sbtk_runtime.errors import BadGallery, BadModel
from sbtk_runtime.files import write_json_atomically
from sbtk_runtime.manifest import (
    BUNDLE_FORMAT,
    GALLERY_FORMAT,
    MANIFEST_NAME,
    BundleManifest,
    FileRecord,
    GalleryManifest,
    GraphRecord,
    MatchRule,
    read_bundle_manifest,
    read_gallery_manifest,
)

SHA256 = "0123456789abcdef" * 4
BUNDLE = BundleManifest(
    name="tiny",
    model_id="tiny@0123456789ab",
    method="sbtknet",
    backbone="resnet50-v1",
    dim=512,
    preprocessing="sbtk-1",
    files={"model.int8.onnx": FileRecord(SHA256, 25_000_000)},
    training={"data": os.fsdecode(b"/data/caf\xe9"), "seeds": [0, 1], "licence": "für Forschung"},
    metrics={"mAP@all": 0.5},
    parity={"int8": {"mean": 0.99}},
    versions={"torch": "2.12.0"},
    created="2026-11-21T12:00:00+00:00",
    match_rule=MatchRule(0.08, 0.068),
)
GALLERY = GalleryManifest(
    generation=7,
    model_id="tiny@0123456789ab",
    precision="int8",
    dim=512,
    preprocessing="sbtk-1",
    live=1000,
    graph=GraphRecord("graph-7.hnsw", SHA256, 1000, 16, 200, 64),
    created="2026-11-21T12:00:00+00:00",
)


def test_a_bundle_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    BUNDLE.write(tmp_path)
    assert read_bundle_manifest(tmp_path) == BUNDLE


@pytest.mark.parametrize(("graph", "bits"), [(GALLERY.graph, None), (None, None), (None, 64)])
def test_a_gallery_manifest_survives_a_round_trip(
    tmp_path: Path, graph: GraphRecord | None, bits: int | None
) -> None:
    manifest = dataclasses.replace(GALLERY, graph=graph, bits=bits)
    assert manifest.format == (1 if bits is None else 2)
    manifest.write(tmp_path)
    assert read_gallery_manifest(tmp_path) == manifest


def test_unknown_keys_of_newer_versions_are_ignored(tmp_path: Path) -> None:
    _write(tmp_path, dataclasses.asdict(BUNDLE) | {"colour": "blue"})
    assert read_bundle_manifest(tmp_path) == BUNDLE


def test_the_error_for_a_newer_format_says_what_to_do(tmp_path: Path) -> None:
    _write(tmp_path, dataclasses.asdict(BUNDLE) | {"format": BUNDLE_FORMAT + 1})
    with pytest.raises(BadModel, match="newer version of sbtk") as caught:
        read_bundle_manifest(tmp_path)
    assert caught.value.next_step == "pip install --upgrade sbtk"
    _write(tmp_path, dataclasses.asdict(GALLERY) | {"format": GALLERY_FORMAT + 1})
    with pytest.raises(BadGallery, match="newer version of sbtk"):
        read_gallery_manifest(tmp_path)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(BundleManifest)])
def test_every_key_of_a_bundle_is_required_but_two(tmp_path: Path, key: str) -> None:
    values = dataclasses.asdict(BUNDLE)
    del values[key]
    _write(tmp_path, values)
    if key in ("domain_input", "match_rule"):
        without: dict[str, Any] = {key: None}
        assert read_bundle_manifest(tmp_path) == dataclasses.replace(BUNDLE, **without)
        return
    with pytest.raises(BadModel, match=rf"has no '{key}'"):
        read_bundle_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 0},
        {"format": "1"},
        {"format": True},
        {"dim": 0},
        {"dim": -1},
        {"dim": 1 << 40},
        {"dim": 512.0},
        {"dim": "512"},
        {"dim": None},
        {"name": 3},
        {"name": "x" * 5000},
        {"name": "two\nlines"},
        {"model_id": "\x1b[2Jtiny@0123456789ab"},
        {"model_id": "tiny@\udc80"},
        {"versions": {"torch": {"deep": 1}}},
        {"match_rule": 0.3},
        {"match_rule": {"intercept": 0.3}},
        {"match_rule": {"intercept": "0.3", "per_decade": 0.1}},
        {"match_rule": {"intercept": float("nan"), "per_decade": 0.1}},
        {"match_rule": {"intercept": 0.3, "per_decade": 1e300}},
        {"training": []},
        {"files": []},
        {"files": {"model.int8.onnx": SHA256}},
        {"files": {"model.int8.onnx": {"sha256": SHA256}}},
        {"files": {"model.int8.onnx": {"sha256": SHA256[:-1], "size_bytes": 1}}},
        {"files": {"model.int8.onnx": {"sha256": SHA256 + "\n", "size_bytes": 1}}},
        {"files": {"model.int8.onnx": {"sha256": SHA256.upper(), "size_bytes": 1}}},
        {"files": {"model.int8.onnx": {"sha256": SHA256, "size_bytes": -1}}},
        {"files": {"model.int8.onnx": {"sha256": SHA256, "size_bytes": 1e3}}},
    ],
)
def test_hostile_values_in_a_bundle_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    _write(tmp_path, dataclasses.asdict(BUNDLE) | change)
    with pytest.raises(BadModel, match=MANIFEST_NAME):
        read_bundle_manifest(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "../x", "a/b", "a\\b", "a\0b", "a\nb", "\ud800", MANIFEST_NAME],
)
def test_names_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    record = {"sha256": SHA256, "size_bytes": 1}
    _write(tmp_path, dataclasses.asdict(BUNDLE) | {"files": {name: record}})
    with pytest.raises(BadModel, match="plain file name"):
        read_bundle_manifest(tmp_path)
    graph = dataclasses.asdict(GALLERY)["graph"] | {"file": name}
    _write(tmp_path, dataclasses.asdict(GALLERY) | {"graph": graph})
    with pytest.raises(BadGallery):
        read_gallery_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"generation": -1},
        {"live": "many"},
        {"dim": 0},
        {"bits": 0},
        {"bits": 64},
        {"format": 2},
        {"format": 2, "bits": 4},
        {"format": 2, "bits": 12},
        {"format": 2, "bits": "64"},
        {"format": 2, "bits": True},
        {"format": 2, "bits": 1 << 40},
        {"graph": []},
        {"graph": {}},
        {"graph": dataclasses.asdict(GALLERY)["graph"] | {"m": 1}},
        {"graph": dataclasses.asdict(GALLERY)["graph"] | {"m": 1_000_000}},
        {"graph": dataclasses.asdict(GALLERY)["graph"] | {"ef": 0}},
        {"graph": dataclasses.asdict(GALLERY)["graph"] | {"count": -5}},
        {"graph": dataclasses.asdict(GALLERY)["graph"] | {"sha256": ""}},
    ],
)
def test_hostile_values_in_a_gallery_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    _write(tmp_path, dataclasses.asdict(GALLERY) | change)
    with pytest.raises(BadGallery, match=MANIFEST_NAME):
        read_gallery_manifest(tmp_path)


def test_errors_about_long_values_are_short(tmp_path: Path) -> None:
    _write(tmp_path, dataclasses.asdict(BUNDLE) | {"dim": "9" * 100_000})
    with pytest.raises(BadModel) as caught:
        read_bundle_manifest(tmp_path)
    assert len(str(caught.value)) < 1000


def _write(folder: Path, values: dict[str, Any]) -> None:
    write_json_atomically(folder / MANIFEST_NAME, values)
