"""What the system refuses to read or write is told by its reason, and is never called damage.

A library refuses calls on files whose path has a given part, as a quota, a failing drive or a
read-only mount does. One process plays all cases.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from tests.faults.system_calls import build_library, refuse, refuse_nothing
from tests.tiny import tiny_bundle, tiny_photo, write_photos
from tests.tiny_gallery import index

_FILES = ("catalogue.sqlite", "vectors/", "codes-1", ".manifest.json", ".catalogue-")
WRITING = [
    *((file, "write", number) for file in _FILES for number in (errno.EDQUOT, errno.EIO)),
    *((file, "write", errno.EFBIG) for file in ("catalogue.sqlite-wal", "vectors/")),
    *((file, "write", errno.ENOSPC) for file in ("catalogue.sqlite-wal", "codes-1")),
    *((file, "fsync", errno.EIO) for file in ("catalogue.sqlite-wal", "vectors/", ".manifest")),
    ("catalogue.sqlite", "read", errno.EIO),
]
READING = [
    ("catalogue-1.sqlite", errno.EIO),
    ("vectors/", errno.EIO),
    ("codes-1", errno.EIO),
    ("manifest.json", errno.EIO),
]


def play(place: Path) -> None:
    """Update a copy of a gallery for each way of being refused; print what came of it."""
    with Embedder(place / "bundle", engine="onnxruntime", threads=1, batch=2) as embedder:
        for part, calls, number in WRITING:
            folder = Path(shutil.copytree(place / "g.sbtk", place / "copy.sbtk"))
            refuse(part, calls, number)
            try:
                update_gallery(folder, [place / "photos"], embedder)
                outcome = ["done", ""]
            except Exception as problem:
                outcome = [type(problem).__name__, str(problem)]
            refuse_nothing()
            before = verify_gallery(folder).problems
            live = update_gallery(folder, [place / "photos"], embedder).live
            print(json.dumps([part, calls, number, *outcome, before, live]), flush=True)
            shutil.rmtree(folder)
    for part, number in READING:
        refuse(part, "read", number)
        try:
            with Gallery.open(place / "g.sbtk") as gallery:
                row = np.ones(gallery.manifest.dim, dtype=np.float32)
                answer = gallery.answer(row, 3, "codes")
                outcome = ["done", " | ".join(answer.notices)]
        except Exception as problem:
            outcome = [type(problem).__name__, str(problem)]
        refuse_nothing()
        print(json.dumps([part, "read", number, *outcome, [], 0]), flush=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], list[Any]]:
    place = tmp_path_factory.mktemp("refused")
    library = build_library(place)
    write_photos(place / "photos", 5)
    index(place / "g.sbtk", place / "photos", tiny_bundle(place / "bundle"))
    tiny_photo(99).save(place / "photos" / "new.png")
    script = "import sys; from tests.faults.test_refused_io import *; play(Path(sys.argv[1]))"
    played = subprocess.run(
        [sys.executable, "-c", script, str(place)],
        env=os.environ | {"LD_PRELOAD": str(library)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    lines = [json.loads(line) for line in played.stdout.splitlines()]
    return {(part, calls, number): rest for part, calls, number, *rest in lines}


def test_refused_writes_are_reported_with_the_reason_and_lose_nothing(
    outcomes: dict[tuple[str, str, int], list[Any]],
) -> None:
    for case in WRITING:
        kind, message, problems, live = outcomes[case]
        assert kind != "done", case
        assert os.strerror(case[2]) in message or (
            case[2] == errno.ENOSPC and "no space left" in message
        ), (case, kind, message)
        is_full = case[2] in (errno.EDQUOT, errno.EFBIG, errno.ENOSPC)
        assert (kind == "DiskFull") == is_full, (case, kind, message)
        assert "damaged" not in message, case
        assert "put" not in message.split("next:")[-1], (case, message)
        assert problems == [], case
        assert live == 6, case


def test_refused_reads_are_reported_with_the_reason(
    outcomes: dict[tuple[str, str, int], list[Any]],
) -> None:
    for part, number in READING:
        kind, message, _, _ = outcomes[part, "read", number]
        assert os.strerror(number) in message, (part, kind, message)
        assert " rm " not in message, (part, message)
    assert outcomes["codes-1", "read", errno.EIO][0] == "done"
    assert outcomes["catalogue-1.sqlite", "read", errno.EIO][0] == "done"


def test_a_file_size_limit_is_named(tmp_path: Path) -> None:
    """`ulimit -f` at many sizes, each of which stops another file or none."""
    bundle = tiny_bundle(tmp_path / "bundle", dim=256)
    write_photos(tmp_path / "photos", 6)
    stopped = set()
    for size in (1 << 12, 3 << 12, 1 << 15, 5 << 13, 1 << 20):
        folder = tmp_path / f"{size}.sbtk"
        pid = os.fork()
        if pid == 0:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                index(folder, tmp_path / "photos", bundle)
                text = "done"
            except BaseException as problem:
                text = f"{type(problem).__name__} {problem}"
            (tmp_path / "told").write_text(text)
            os._exit(0)
        os.waitpid(pid, 0)
        text = (tmp_path / "told").read_text()
        if text != "done":
            assert text.startswith("DiskFull"), text
            assert os.strerror(errno.EFBIG) in text
            assert f"{size:,} bytes" in text
            assert "ulimit -f unlimited" in text
        stopped.add(text == "done")
        index(folder, tmp_path / "photos", bundle)
        assert verify_gallery(folder).problems == ()
    assert stopped == {True, False}
