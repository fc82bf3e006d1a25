"""kill -9 at any moment of an update: readers see a whole generation, and a resumed update ends
where an uninterrupted one does."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadGallery
from sbtk_runtime.gallery import hnsw
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.manifest import GalleryManifest, read_gallery_manifest
from tests.tiny import tiny_photo, write_photos
from tests.tiny_gallery import contents, index, processes, tiny_code_bundle

pytestmark = pytest.mark.kill

KILLED = -signal.SIGKILL


def index_and_tell(folder: Path, photos: Path, bundle: Path, progress: Connection) -> None:
    """Update a gallery and send the number of photos that are done."""

    def tell(done: int, total: int | None, rate: float) -> None:
        progress.send(done)
        time.sleep(0.005)

    with Embedder(bundle, engine="onnxruntime", threads=1, batch=2) as embedder:
        update_gallery(folder, [photos], embedder, progress=tell, commit_every=4)
    progress.send(-1)


def index_until_sync(
    folder: Path, photos: Path, bundle: Path, syncs: int, bits: int | None = None
) -> None:
    """Update a gallery, and die at the given call of fsync."""
    left = syncs
    real = os.fsync

    def counted(descriptor: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = counted  # type: ignore[assignment]
    index(folder, photos, bundle, bits=bits)


def index_until_published(
    folder: Path, photos: Path, bundle: Path, graph_from: int = hnsw.GRAPH_FROM
) -> None:
    """Update a gallery, and die when all but the manifest is written."""
    hnsw.GRAPH_FROM = graph_from

    def die(self: GalleryManifest, folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    GalleryManifest.write = die  # type: ignore[method-assign]
    index(folder, photos, bundle)


def run(target: Callable[..., None], *args: object) -> int | None:
    """Run a function in a separate process and return its exit code."""
    process = processes().Process(target=target, args=args)
    process.start()
    process.join(120)
    return process.exitcode


def change(photos: Path) -> None:
    """Make one photo new, one changed, one moved, one vanished and one unreadable."""
    paths = sorted(photos.iterdir())
    tiny_photo(501).save(photos / "new.png")
    tiny_photo(502).save(paths[1])
    paths[2].rename(photos / "moved.png")
    paths[3].unlink()
    (photos / "junk.jpg").write_bytes(b"junk")


def names_in(folder: Path) -> set[str]:
    with Gallery.open(folder) as gallery:
        query = np.ones(gallery.manifest.dim, dtype=np.float32)
        found = gallery.search(query, gallery.count)
        if gallery.manifest.bits is None:
            assert gallery.search(query, gallery.count, "codes") == found
        return {Path(hit.path).name for hit in found}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_code_bundle(tmp_path_factory.mktemp("bundle"), 16)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 10)
    (folder / "photo-0005.png").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, bundle: Path
) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "g.sbtk"
    index(folder, photos, bundle)
    return contents(folder)


@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_at_random_and_resumed_equals_an_uninterrupted_one(
    tmp_path: Path, photos: Path, bundle: Path, uninterrupted: dict[str, object], seed: int
) -> None:
    moment = random.Random(seed)
    folder = tmp_path / "g.sbtk"
    for _ in range(2):
        ours, theirs = processes().Pipe(duplex=False)
        process = processes().Process(target=index_and_tell, args=(folder, photos, bundle, theirs))
        process.start()
        theirs.close()
        enough = moment.randint(1, 6)
        try:
            while 0 <= ours.recv() < enough:
                pass
        except EOFError:
            pass
        time.sleep(moment.random() * 0.02)
        process.kill()
        process.join(60)
        ours.close()
    index(folder, photos, bundle)
    assert contents(folder) == uninterrupted
    assert verify_gallery(folder).problems == ()


@pytest.mark.parametrize("bits", [None, 16])
def test_a_first_run_survives_a_kill_at_every_sync(
    tmp_path: Path, photos: Path, bundle: Path, bits: int | None
) -> None:
    index(tmp_path / "expected.sbtk", photos, bundle, bits=bits)
    expected = contents(tmp_path / "expected.sbtk")
    for syncs in range(1, 40):
        folder = tmp_path / f"{syncs}.sbtk"
        exit_code = run(index_until_sync, folder, photos, bundle, syncs, bits)
        if (folder / "manifest.json").exists():
            assert len(names_in(folder)) == 9
        else:
            with pytest.raises(BadGallery):
                Gallery.open(folder)
        if exit_code != KILLED:
            break
        index(folder, photos, bundle, bits=bits)
        assert contents(folder) == expected
        shutil.rmtree(folder)
    assert exit_code == 0
    assert syncs > 8


@pytest.mark.parametrize("bits", [None, 16])
def test_an_update_survives_a_kill_at_every_sync(
    tmp_path: Path, bundle: Path, bits: int | None
) -> None:
    photos, before = tmp_path / "photos", tmp_path / "before.sbtk"
    write_photos(photos, 8)
    index(before, photos, bundle, bits=bits)
    old_names = names_in(before)
    change(photos)
    shutil.copytree(before, tmp_path / "expected.sbtk")
    index(tmp_path / "expected.sbtk", photos, bundle)
    expected = contents(tmp_path / "expected.sbtk")
    new_names = names_in(tmp_path / "expected.sbtk")
    assert new_names != old_names
    for syncs in range(1, 40):
        folder = tmp_path / f"{syncs}.sbtk"
        shutil.copytree(before, folder)
        exit_code = run(index_until_sync, folder, photos, bundle, syncs)
        assert names_in(folder) in (old_names, new_names)
        index(folder, photos, bundle)
        assert contents(folder) == expected
        assert len(list(folder.glob("codes-*"))) == (bits is None)
        assert verify_gallery(folder).problems == ()
        assert list(folder.glob(".*.tmp-*")) == []
        if exit_code != KILLED:
            break
    assert exit_code == 0
    assert syncs > (6 if bits is None else 5)


def test_after_a_kill_between_graph_and_manifest_the_old_generation_is_used(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hnsw, "GRAPH_FROM", 1)
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    write_photos(photos, 8)
    index(folder, photos, bundle)
    old_names = names_in(folder)
    change(photos)
    assert run(index_until_published, folder, photos, bundle, 1) == KILLED
    assert sorted(path.name for path in folder.glob("graph-*")) == ["graph-1.hnsw", "graph-2.hnsw"]
    assert names_in(folder) == old_names
    index(folder, photos, bundle)
    assert [path.name for path in folder.glob("graph-*")] == ["graph-2.hnsw"]
    assert names_in(folder) == {path.name for path in photos.iterdir()} - {"junk.jpg"}


def test_after_a_kill_between_codes_and_manifest_the_old_generation_is_used(
    tmp_path: Path, bundle: Path
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    write_photos(photos, 8)
    index(folder, photos, bundle)
    old_names = names_in(folder)
    change(photos)
    assert run(index_until_published, folder, photos, bundle) == KILLED
    record = read_gallery_manifest(folder).codes
    assert record is not None
    shard = folder / record.folder / "000000.bits"
    assert shard.stat().st_size > record.files[shard.name].size_bytes
    assert names_in(folder) == old_names
    assert verify_gallery(folder).problems == ()
    index(folder, photos, bundle)
    assert verify_gallery(folder).problems == ()
    assert names_in(folder) == {path.name for path in photos.iterdir()} - {"junk.jpg"}
