"""What tests of collections in any database share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbtk_runtime.gallery.push import PushReport, push_gallery
from sbtk_runtime.gallery.queries import Queries
from sbtk_runtime.gallery.remote import open_store
from tests.milvus_server import NEEDS_LITE, NEEDS_MILVUS, LiteServer, MilvusServer
from tests.postgres_server import NEEDS_POSTGRES, PostgresServer
from tests.tiny import tiny_photo, write_photos


def push(gallery: Path, url: str, source: str | None = "nas", **options: float) -> PushReport:
    return push_gallery(gallery, open_store(url, **options), source)


def hits_of(
    gallery: Queries, query: np.ndarray, k: int, **options: object
) -> list[tuple[float, str, tuple[str, ...]]]:
    """Return score and paths of the hits; equal scores may come in any order."""
    answer = gallery.answer(query, k, **options)  # type: ignore[arg-type]
    hits = []
    for hit in answer.hits:
        paths = sorted([hit.path, *(copy.path for copy in hit.copies)])
        hits.append((round(hit.score, 4), paths[0], tuple(paths[1:])))
    return sorted(hits, key=lambda hit: (-hit[0], hit[1]))


def write_tree(folder: Path) -> Path:
    """Write 15 photos with copies, a folder and a name that is not UTF-8, and return the folder."""
    paths = write_photos(folder, 8)
    write_photos(folder / "2019", 4, seed=1)
    shutil.copyfile(paths[0], folder / "2019" / "copy.jpg")
    shutil.copyfile(paths[0], folder / "copy.jpg")
    tiny_photo(77).save(os.fsdecode(os.fsencode(folder) + b"/caf\xe9 \\n.png"))
    return folder


Server = PostgresServer | MilvusServer
POSTGRES = pytest.param(PostgresServer, id="postgres", marks=NEEDS_POSTGRES)
LITE = pytest.param(LiteServer, id="milvus-lite", marks=NEEDS_LITE)
MILVUS = pytest.param(MilvusServer, id="milvus", marks=NEEDS_MILVUS)


def server_fixture(*databases: object) -> Any:
    """Return a fixture of a server of each database, which the tests of a module share."""

    @pytest.fixture(scope="module", params=databases)
    def server(request: pytest.FixtureRequest) -> Iterator[Server]:
        started = request.param()
        yield started
        started.close()

    return server
