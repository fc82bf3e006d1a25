"""On a slow disk everything takes longer, and nothing else is different."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from tests.faults.system_calls import build_library, delaying
from tests.serve_client import query, sketch_png
from tests.serve_process import serving
from tests.tiny import tiny_bundle, tiny_photo, write_photos
from tests.tiny_gallery import index

PHOTOS = 6
# Of each read, write and fsync.
CALL_US, SLOW_CALL_US = 3_000, 300_000

#: The scores of photos by their names, and notices.
Answer = tuple[dict[str, float], tuple[str, ...]]


def answer_of(folder: Path) -> Answer:
    with Gallery.open(folder) as gallery:
        row = np.ones(gallery.manifest.dim, dtype=np.float32)
        answer = gallery.answer(row, gallery.count)
        return {Path(hit.path).name: round(hit.score, 5) for hit in answer.hits}, answer.notices


def play(place: Path) -> None:
    """Add a photo while others read; print the answers, and what verifying finds."""
    answers: list[Answer] = []

    def update() -> None:
        with Embedder(place / "bundle", engine="onnxruntime", threads=1, batch=2) as embedder:
            update_gallery(place / "g.sbtk", [place / "photos"], embedder, commit_every=1)

    writer = threading.Thread(target=update)
    writer.start()
    while writer.is_alive():
        answers.append(answer_of(place / "g.sbtk"))
    writer.join()
    answers.append(answer_of(place / "g.sbtk"))
    print(json.dumps([answers, verify_gallery(place / "g.sbtk").problems]))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", PHOTOS)
    index(tmp_path / "g.sbtk", tmp_path / "photos", tiny_bundle(tmp_path / "bundle"))
    return tmp_path


def test_readers_and_a_writer_on_a_slow_disk_disturb_each_other_no_more(place: Path) -> None:
    library = build_library(place)
    before = answer_of(place / "g.sbtk")
    tiny_photo(99).save(place / "photos" / "new.png")
    index(place / "fast.sbtk", place / "photos", place / "bundle")
    after = answer_of(place / "fast.sbtk")
    script = "import sys; from tests.faults.test_slow_disk import *; play(Path(sys.argv[1]))"
    played = subprocess.run(
        [sys.executable, "-c", script, str(place)],
        env=os.environ | delaying(library, "g.sbtk", CALL_US),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    answers, problems = json.loads(played.stdout)
    right = [json.loads(json.dumps(answer)) for answer in (before, after)]
    assert len(before[0]) == PHOTOS and len(after[0]) == PHOTOS + 1
    assert all(answer in right for answer in answers)
    assert right[0] in answers and answers[-1] == right[1]
    assert problems == []


@pytest.mark.slow
def test_a_server_answers_others_while_a_search_waits_for_the_disk(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in delaying(build_library(place), "g.sbtk/vectors", SLOW_CALL_US).items():
        monkeypatch.setenv(name, value)
    options = ("--model", str(place / "bundle"), "--engine", "onnxruntime", "--threads", "1")
    with serving(place / "g.sbtk", *options, log=place / "log") as server:
        server.wait_until_ready()
        answered_meanwhile = 0
        with ThreadPoolExecutor() as client:
            waiting = client.submit(query, server.port, sketch_png(), f"?as=sketch&k={PHOTOS}")
            while not waiting.done():
                status, health = server.health()
                assert (status, health["status"]) == (200, "ok")
                answered_meanwhile += not waiting.done()
        assert waiting.result().status == 200
        assert len(waiting.result().json()["hits"]) == PHOTOS
        assert waiting.result().json()["notices"] == []
        assert answered_meanwhile >= 1
