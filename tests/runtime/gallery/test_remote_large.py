"""Collections of so many photos that databases search them by their index.

On PostgreSQL; `test_milvus` runs these tests on Milvus, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.push import PushReport, push_gallery
from sbtk_runtime.gallery.queries import Queries, Search
from sbtk_runtime.gallery.remote import EXACT_BELOW, RemoteError, open_store
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from sbtk_runtime.generated_inputs import clustered_vectors
from tests.postgres_server import PASSWORD, PostgresServer
from tests.tiny_gallery import code_gallery_of, gallery_of, tiny_itq
from tests.tiny_remote import POSTGRES, Server, server_fixture

pytestmark = pytest.mark.slow

server = server_fixture(POSTGRES)
DIM, CHANGED, GONE = 32, 1000, 500
COUNT = EXACT_BELOW + GONE


def push(gallery: Path, url: str, said: list[str] | None = None) -> PushReport:
    store, notices = open_store(url, patience_s=60), [] if said is None else said
    return push_gallery(gallery, store, "nas", notify=notices.append, batch=2000)


def counts(report: PushReport) -> tuple[int, int, int]:
    return report.pushed, report.unchanged, report.deleted


@pytest.mark.kill
def test_a_large_collection_follows_changes_and_survives_a_restart(
    server: Server, url: str, tmp_path: Path
) -> None:
    rows = clustered_vectors(COUNT, DIM)
    gallery_of(tmp_path / "first.sbtk", rows, commit_every=4096)
    later = np.concatenate([clustered_vectors(CHANGED, DIM, seed=5), rows[CHANGED:-GONE]])
    gallery_of(tmp_path / "later.sbtk", later, commit_every=4096, changed=CHANGED)
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done >= total // 2 and not killed:
            killed.append(done)
            server.kill()
            threading.Thread(target=server.start).start()

    has_index = isinstance(server, PostgresServer)  # Milvus builds it by itself
    said: list[str] = []
    report = push_gallery(
        *(tmp_path / "first.sbtk", open_store(url, patience_s=60), "nas"),
        progress=kill,
        notify=said.append,
        batch=2000,
    )
    assert killed and counts(report) == (COUNT, 0, 0)
    assert any(f"index of {COUNT:,} photos" in text for text in said) is has_index
    if has_index:
        said.clear()
        assert counts(push(tmp_path / "first.sbtk", url, said)) == (0, COUNT, 0)
        assert said == []  # the index is there
    same = COUNT - CHANGED - GONE
    assert counts(push(tmp_path / "later.sbtk", url)) == (CHANGED, same, GONE)
    if has_index:
        assert counts(push(tmp_path / "later.sbtk", url)) == (0, same + CHANGED, 0)
    # Milvus compares all photos here where it is to be exact.
    queries = clustered_vectors(20 if has_index else 4, DIM, of=COUNT)
    with (
        Gallery.open(tmp_path / "later.sbtk") as local,
        RemoteGallery.open(url, {"nas": "/"}, patience_s=60) as there,
    ):
        assert len(there) == len(local) == EXACT_BELOW
        shared = 0
        for query in queries:
            expected = local.answer(query, 10, "exact", fold=False).hits
            found = there.answer(query, 10, "exact", fold=False).hits
            assert [hit.path for hit in found] == [hit.path for hit in expected]
            by_index = there.answer(query, 10, "hnsw", fold=False).hits
            shared += len({hit.path for hit in by_index} & {hit.path for hit in expected})
            for folder in ("/photos/0000", "/photos/1999", "/photos/2049"):
                mine, theirs = (
                    [hit.path for hit in one.answer(query, 10, under=folder, fold=False).hits]
                    for one in (local, there)
                )
                assert mine == theirs and len(mine) == (0 if folder.endswith("2049") else 10)
        assert shared >= 0.95 * 10 * len(queries)


@pytest.fixture
def small_disk(server: PostgresServer) -> Iterator[Path]:
    """A file system of 24 MB that the server can write to."""
    place = server.place / "home" / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    owner = place.parent.stat()
    os.chown(place, owner.st_uid, owner.st_gid)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.kill
def test_a_push_to_a_full_disk_says_so_and_resumes(
    server: PostgresServer, small_disk: Path, tmp_path: Path
) -> None:
    gallery_of(tmp_path / "g.sbtk", clustered_vectors(16_000, 512), commit_every=4096)
    server.execute(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
    server.execute("CREATE DATABASE small TABLESPACE small")
    url = server.url("small")
    with pytest.raises(RemoteError) as caught:
        push(tmp_path / "g.sbtk", url)
    assert "the disk of" in caught.value.found and "is full" in caught.value.found
    assert "resumes" in caught.value.next_step and PASSWORD not in str(caught.value)
    larger = ["mount", "-o", "remount,size=96m", str(small_disk)]
    subprocess.run(larger, check=True)
    report = push(tmp_path / "g.sbtk", url)
    assert report.unchanged >= 2000 and report.pushed + report.unchanged == 16_000
    server.execute("DROP DATABASE small")
    server.execute("DROP TABLESPACE small")


def test_a_large_collection_of_codes_follows_changes(
    server: Server, url: str, tmp_path: Path
) -> None:
    itq = tiny_itq(DIM, 32)
    codes = itq.codes(clustered_vectors(COUNT, DIM))
    code_gallery_of(tmp_path / "first.sbtk", codes, itq, commit_every=4096)
    changed = itq.codes(clustered_vectors(CHANGED, DIM, seed=5))
    later = np.concatenate([changed, codes[CHANGED:-GONE]])
    code_gallery_of(tmp_path / "later.sbtk", later, itq, commit_every=4096, changed=CHANGED)
    has_index = isinstance(server, PostgresServer)
    said: list[str] = []
    assert counts(push(tmp_path / "first.sbtk", url, said)) == (COUNT, 0, 0)
    assert any("building the index" in text for text in said) is has_index
    assert counts(push(tmp_path / "first.sbtk", url)) == (0, COUNT, 0)
    same = COUNT - CHANGED - GONE
    assert counts(push(tmp_path / "later.sbtk", url)) == (CHANGED, same, GONE)
    with (
        Gallery.open(tmp_path / "later.sbtk") as local,
        RemoteGallery.open(url, {"nas": "/"}, patience_s=60) as there,
    ):
        equal = 0
        ways: list[tuple[Queries, Search]] = [(local, "exact"), (there, "exact"), (there, "auto")]
        # Milvus compares all codes where it is to be exact.
        queries = clustered_vectors(20 if has_index else 5, DIM, of=COUNT)
        for query in queries:
            scores = [
                [round(hit.score, 6) for hit in one.answer(query, 10, search, fold=False).hits]
                for one, search in ways
            ]
            assert scores[1] == scores[0]
            equal += scores[2] == scores[0]
        assert equal >= 0.9 * len(queries)
        for folder in ("/photos/0000", "/photos/1999", "/photos/2049"):
            mine, theirs = (
                {
                    hit.path: round(hit.score, 6)
                    for hit in one.answer(query, 20, under=folder, fold=False).hits
                }
                for one in (local, there)
            )
            assert theirs == mine and len(mine) == (0 if folder.endswith("2049") else 10)
