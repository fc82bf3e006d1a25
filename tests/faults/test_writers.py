"""One writer, any number of readers, and each reader sees one generation."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import GalleryBusy, SbtkError
from sbtk_runtime.files import WriterLock
from sbtk_runtime.gallery import gallery as reading
from sbtk_runtime.gallery.folder import LOCK_NAME
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from tests.tiny import tiny_bundle, write_photos
from tests.tiny_gallery import contents, gallery_of, index, photo_gallery, processes, unit_rows


def hold(folder: Path, ready: Connection) -> None:
    """Is the gallery's writer until it is killed."""
    folder.mkdir(exist_ok=True)
    with WriterLock(folder / LOCK_NAME):
        ready.send(os.getpid())
        signal.pause()


def rename_again_and_again(folder: Path, photos: Path, bundle: Path, done: Event) -> None:
    """Move all photos to another folder and updates the gallery, five times."""
    for turn in range(1, 6):
        photos = photos.rename(photos.with_name(f"turn-{turn}"))
        index(folder, photos, bundle, commit_every=3)
    done.set()


def test_the_error_of_a_second_writer_names_the_first(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = photo_gallery(tmp_path, 3, embedder)
    before = contents(folder)
    write_photos(photos, 6)
    ours, theirs = processes().Pipe(duplex=False)
    holder = processes().Process(target=hold, args=(folder, theirs))
    holder.start()
    pid = ours.recv()
    try:
        with pytest.raises(GalleryBusy) as caught:
            update_gallery(folder, [photos], embedder)
        assert f"PID {pid}, since 20" in caught.value.found
        assert "same command again" in caught.value.next_step
        assert contents(folder) == before
        with Gallery.open(folder) as gallery:
            assert gallery.count == 3
    finally:
        holder.kill()
        holder.join()
    # The kernel has released the lock of the dead.
    assert update_gallery(folder, [photos], embedder).new == 3


def test_each_answer_comes_from_one_generation(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    write_photos(photos, 12)
    index(folder, photos, bundle)
    context = processes()
    done = context.Event()
    writer = context.Process(target=rename_again_and_again, args=(folder, photos, bundle, done))
    writer.start()
    query = np.ones(16, dtype=np.float32)
    folders_seen = set()
    kept = Gallery.open(folder)
    expected = kept.search(query, 12)
    while not done.is_set() and writer.is_alive():
        with Gallery.open(folder) as gallery:
            hits = gallery.search(query, 12)
            assert len({hit.id for hit in hits}) == 12
            (place,) = {Path(hit.path).parent.name for hit in hits}
            folders_seen.add((gallery.manifest.generation, place))
            assert gallery.search(query, 12, "hnsw") != []
        assert kept.search(query, 12) == expected
    writer.join()
    assert writer.exitcode == 0
    kept.close()
    for generation, place in folders_seen:
        assert place == ("photos" if generation == 1 else f"turn-{generation - 1}")


def test_threads_can_search_one_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "EXACT_BELOW", 100)
    rows = unit_rows(500, 16)
    gallery_of(tmp_path / "g", rows)
    problems: list[str] = []
    with Gallery.open(tmp_path / "g") as gallery:

        def ask(seed: int) -> None:
            for query in unit_rows(30, 16, seed=seed):
                for k in (1, 10, 200):
                    found = [hit.id - 1 for hit in gallery.search(query, k, "hnsw")]
                    truth = np.argsort(-(rows @ query), kind="stable")[:k]
                    if len(set(found) & set(truth.tolist())) < 0.9 * k:
                        problems.append(f"{k}: {found}")

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []


def test_a_gallery_on_a_read_only_disk_is_searched_but_not_written(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos, folder = photo_gallery(tmp_path, 3, embedder)
    place = tmp_path / "read-only"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting read-only needs root")
    bound = subprocess.run(["mount", "--bind", str(folder), str(place)], capture_output=True)
    if bound.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {bound.stderr.decode().strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        with Gallery.open(place) as gallery:
            for search in ("auto", "codes"):
                hits = gallery.query(photos / "photo-0000.jpg", embedder, 3, "photo", search=search)
                assert len(hits) == 3
        with pytest.raises(SbtkError, match="read-only cannot be written"):
            update_gallery(place, [photos], embedder)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
