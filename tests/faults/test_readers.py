"""Readers without write permission get right hits while a writer works, dies and resumes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.manifest import read_gallery_manifest
from tests.serve_client import ask, query, sketch_png
from tests.serve_process import serving
from tests.tiny import tiny_bundle, tiny_photo, write_photos
from tests.tiny_gallery import index, processes

pytestmark = pytest.mark.kill

NOBODY = 65534
PHOTOS = 8
KILLS = 4

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")

#: The score of every photo, by name.
Scores = dict[str, float]


@dataclass(frozen=True)
class Workplace:
    """A gallery that is written, where it is read, and what each of its two states answers."""

    photos: Path
    gallery: Path
    bundle: Path
    extra: Path
    right: list[Scores]


@pytest.fixture
def workplace() -> Iterator[Workplace]:
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place)
        photos, gallery, extra = folder / "photos", folder / "g.sbtk", folder / "extra.png"
        write_photos(photos, PHOTOS)
        tiny_photo(700).save(extra)
        bundle = tiny_bundle(folder / "bundle")
        index(gallery, photos, bundle)
        right = [scores_in(gallery)]
        shutil.copy(extra, photos / "extra.png")
        index(folder / "other.sbtk", photos, bundle)
        right.append(scores_in(folder / "other.sbtk"))
        (photos / "extra.png").unlink()
        assert len(right[0]) == PHOTOS
        assert len(right[1]) == PHOTOS + 1
        yield Workplace(photos, gallery, bundle, extra, right)


def scores_in(folder: Path) -> Scores:
    """Return what a gallery answers, without a notice; an answer that is torn is an error."""
    with Gallery.open(folder) as gallery:
        row = np.ones(gallery.manifest.dim, dtype=np.float32)
        hits = gallery.search(row, gallery.count)
        paths = [gallery.photo(hit.id) for hit in hits]
        assert [photo.path for photo in paths if photo] == [hit.path for hit in hits]
        assert gallery.notices == []
        return {Path(hit.path).name: round(hit.score, 5) for hit in hits}


def names_in_use(folder: Path) -> set[str] | None:
    """Return the photos that the writer's own catalogue has of the published generation.

    `None` if another one was published in between, whose start may have removed this one's.
    """
    before = read_gallery_manifest(folder)
    with closing(CatalogueView(folder, before.generation)) as view:
        names = {Path(photo.path).name for photo in view.photos()}
    return names if read_gallery_manifest(folder) == before else None


def become(user: int) -> None:
    if user != os.geteuid():
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)


def write_on(workplace: Workplace, published: Connection) -> None:
    """Let one photo come and go, and tell of each generation; end by being killed."""
    there = workplace.photos / "extra.png"
    with Embedder(workplace.bundle, engine="onnxruntime", threads=1, batch=2) as embedder:
        while True:
            if there.exists():
                there.unlink()
            else:
                shutil.copy(workplace.extra, workplace.photos / ".extra.tmp")
                (workplace.photos / ".extra.tmp").rename(there)
            update_gallery(workplace.gallery, [workplace.photos], embedder, commit_every=1)
            published.send(1)


def read_on(workplace: Workplace, folder: Path, user: int, told: Connection) -> None:
    """Count answers until it is told to stop: right, wrong, and errors by their text."""
    # Python's own files may be closed to the other user: load what a search imports only when used.
    scores_in(folder)
    become(user)
    assert not os.access(folder, os.W_OK)
    counts: Counter[str] = Counter()
    right_names = [set(scores) for scores in workplace.right]
    while not told.poll():
        try:
            counts["right" if scores_in(folder) in workplace.right else "wrong"] += 1
            names = names_in_use(folder)
            if names is not None:
                counts["right in use" if names in right_names else "wrong in use"] += 1
        except Exception as problem:
            counts[f"{type(problem).__name__}: {problem}"] += 1
    told.send(counts)


@contextlib.contextmanager
def writer(workplace: Workplace) -> Iterator[tuple[BaseProcess, Connection]]:
    ours, theirs = processes().Pipe(duplex=False)
    process = processes().Process(target=write_on, args=(workplace, theirs))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(60)
        ours.close()


@contextlib.contextmanager
def read_only(folder: Path, way: str) -> Iterator[tuple[Path, int]]:
    """Give the block a path at which a user, also given, may read the folder and not write."""
    if way == "another user":
        yield folder, NOBODY
        return
    place = folder.with_name("read-only.sbtk")
    place.mkdir()
    mounted = subprocess.run(["mount", "--bind", str(folder), str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        yield place, os.geteuid()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@needs_root
@pytest.mark.parametrize("way", ["another user", "a read-only mount"])
def test_answers_are_right_while_a_writer_is_killed_repeatedly(
    workplace: Workplace, way: str
) -> None:
    moment = random.Random(0)
    with read_only(workplace.gallery, way) as (folder, user):
        ours, theirs = processes().Pipe()
        reader = processes().Process(target=read_on, args=(workplace, folder, user, theirs))
        reader.start()
        theirs.close()
        generations = 0
        for _ in range(KILLS):
            with writer(workplace) as (_, published):
                generations += published.recv()
                generations += published.recv()
                time.sleep(moment.random() * 0.1)
        ours.send(True)
        counts = ours.recv()
        reader.join(60)
    assert set(counts) == {"right", "right in use"}, counts
    assert min(counts.values()) >= 5
    assert generations == 2 * KILLS


@needs_root
def test_a_server_on_a_read_only_mount_shows_every_photo_while_a_writer_writes(
    workplace: Workplace,
) -> None:
    log = workplace.gallery.with_name("log")
    options = ("--model", str(workplace.bundle), "--engine", "onnxruntime", "--threads", "1")
    statuses: Counter[int] = Counter()
    with (
        read_only(workplace.gallery, "a read-only mount") as (folder, _),
        serving(folder, *options, log=log) as server,
    ):
        server.wait_until_ready()
        with writer(workplace) as (_, published):
            generations = 0
            while generations < 6:
                for photo_id in range(1, PHOTOS + 1):
                    statuses[ask(server.port, f"/v1/photos/{photo_id}").status] += 1
                    statuses[ask(server.port, f"/v1/photos/{photo_id}/file").status] += 1
                answer = query(server.port, sketch_png(), f"?k={PHOTOS}")
                assert answer.json()["notices"] == []
                assert len(answer.json()["hits"]) == PHOTOS
                while published.poll():
                    generations += published.recv()
    assert set(statuses) == {200}, statuses
    assert "Traceback" not in log.read_text()
