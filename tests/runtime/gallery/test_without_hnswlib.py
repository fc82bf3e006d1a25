"""Everything but the graph works without hnswlib."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import MissingExtra
from sbtk_runtime.gallery import gallery as reading
from sbtk_runtime.gallery import hnsw
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.hnsw import has_hnswlib
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.manifest import read_gallery_manifest
from tests.tiny import tiny_bundle, write_photos, write_sketch
from tests.tiny_gallery import gallery_of, index, unit_rows

QUERY = unit_rows(1, 16, seed=5)[0]
INSTALL = 'pip install "sbtk[hnsw]"'


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Return what has made hnswlib impossible to import; `undo` brings it back."""
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    assert not has_hnswlib()
    return monkeypatch


@pytest.fixture
def is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "EXACT_BELOW", 100)


@pytest.fixture
def has_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hnsw, "GRAPH_FROM", 1)


def found_ids(folder: Path, notices: int = 0) -> list[int]:
    with Gallery.open(folder) as gallery:
        ids = [hit.id for hit in gallery.search(QUERY, 10)]
        assert len(gallery.notices) == notices, gallery.notices
    return ids


def nearest_ids(rows: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> list[int]:
    return [int(row) + 1 for row in np.argsort(-(rows @ QUERY), kind="stable")[:10]]


def test_a_gallery_is_indexed_searched_and_verified(tmp_path: Path, without: object) -> None:
    rows = unit_rows(300, 16)
    manifest = gallery_of(tmp_path / "gallery", rows)
    assert manifest.graph is None
    assert found_ids(tmp_path / "gallery") == nearest_ids(rows)
    report = verify_gallery(tmp_path / "gallery")
    assert report.is_good
    assert (report.found, report.by_graph) == (report.sampled, False)


def test_a_graph_is_refused_on_request_and_never_required(tmp_path: Path, without: object) -> None:
    gallery_of(tmp_path / "gallery", unit_rows(300, 16))
    with Gallery.open(tmp_path / "gallery") as gallery:
        with pytest.raises(MissingExtra) as caught:
            gallery.search(QUERY, 10, "hnsw")
        assert caught.value.exit_code == 1
        assert caught.value.next_step == INSTALL
        assert len(gallery.search(QUERY, 10)) == 10


@pytest.mark.usefixtures("is_large", "has_graph")
def test_a_large_gallery_is_searched_by_its_codes(
    tmp_path: Path, without: pytest.MonkeyPatch
) -> None:
    rows = unit_rows(300, 16)
    gallery_of(tmp_path / "gallery", rows)
    assert found_ids(tmp_path / "gallery") == nearest_ids(rows)


@pytest.mark.usefixtures("is_large")
def test_a_notice_says_how_to_speed_up_an_older_gallery(
    tmp_path: Path, without: pytest.MonkeyPatch
) -> None:
    rows = unit_rows(300, 16)
    gallery_of(tmp_path / "gallery", rows, is_old=True)
    with Gallery.open(tmp_path / "gallery") as gallery:
        assert [hit.id for hit in gallery.search(QUERY, 10)] == nearest_ids(rows)
        (notice,) = gallery.notices
    assert "300 photos have no sign codes" in notice and "sbtk index" in notice


@pytest.mark.usefixtures("has_graph")
@pytest.mark.parametrize("is_big", [False, True])
def test_a_graph_built_elsewhere_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_big: bool
) -> None:
    rows = unit_rows(300, 16)
    folder = tmp_path / "gallery"
    assert gallery_of(folder, rows).graph is not None
    if is_big:
        monkeypatch.setattr(reading, "EXACT_BELOW", 100)
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    assert found_ids(folder) == nearest_ids(rows)
    assert verify_gallery(folder).is_good
    # Its file is judged all the same.
    (graph,) = folder.glob("graph-*")
    graph.write_bytes(graph.read_bytes()[:-1])
    (problem,) = verify_gallery(folder).problems
    assert "SHA-256" in problem


@pytest.mark.usefixtures("has_graph")
def test_a_change_drops_the_graph_and_hnswlib_rebuilds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, photos, folder = tiny_bundle(tmp_path / "b"), tmp_path / "photos", tmp_path / "gallery"
    write_photos(photos, 6)
    index(folder, photos, bundle)
    first = read_gallery_manifest(folder)
    assert first.graph is not None

    with monkeypatch.context() as blocked:
        blocked.setitem(sys.modules, "hnswlib", None)
        # What has not changed keeps its graph.
        index(folder, photos, bundle)
        assert read_gallery_manifest(folder) == first
        (photos / "photo-0000.jpg").unlink()
        index(folder, photos, bundle)
        assert read_gallery_manifest(folder).graph is None
        assert list(folder.glob("graph-*")) == []
        assert len(found_ids(folder, notices=1)) == 5  # ten were asked for

    assert len(found_ids(folder, notices=1)) == 5
    index(folder, photos, bundle)
    graph = read_gallery_manifest(folder).graph
    assert graph is not None and graph.count == 5
    report = verify_gallery(folder)
    assert report.is_good and report.by_graph


@pytest.mark.usefixtures("has_graph")
def test_indexing_a_very_large_gallery_mentions_the_missing_graph_once(
    tmp_path: Path, without: object
) -> None:
    write_photos(tmp_path / "photos", 5)
    messages: list[str] = []
    with Embedder(tiny_bundle(tmp_path / "b"), engine="onnxruntime", threads=1) as embedder:
        update_gallery(
            tmp_path / "gallery", [tmp_path / "photos"], embedder, notify=messages.append
        )
    assert sum(INSTALL in text for text in messages) == 1


@pytest.mark.slow
def test_commands_work_without_hnswlib(tmp_path: Path) -> None:
    """In processes that cannot import it, from index to the search that needs it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys; sys.modules['hnswlib'] = None")
    bundle = tiny_bundle(tmp_path / "b")
    write_photos(tmp_path / "photos", 5)
    write_sketch(tmp_path / "sketch.png")

    def sbtk(*arguments: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)])
        return subprocess.run(
            [sys.executable, "-m", "sbtk_cli", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    done = sbtk("index", "photos", "--model", str(bundle))
    assert done.returncode == 0, done.stderr
    assert "hnsw" not in done.stderr and "compiler" not in done.stderr
    done = sbtk("query", "sketch.png", "--model", str(bundle), "-k", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["rank"] for line in done.stdout.splitlines()] == [1, 2, 3]
    done = sbtk("query", "sketch.png", "--model", str(bundle), "--search", "hnsw")
    assert done.returncode == 1
    assert "extra 'hnsw'" in done.stderr and INSTALL in done.stderr
    assert "Traceback" not in done.stderr
    done = sbtk("index", "--verify")
    assert done.returncode == 0, done.stderr
    assert "by exact search" in done.stdout
    done = sbtk("query", "sketch.png", "--model", str(bundle), "--search", "codes", "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
