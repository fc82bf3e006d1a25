"""What is particular to collections in PostgreSQL; `test_remote_engines` has what is not."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig, DiskFull, SbtkError
from sbtk_runtime.gallery import remote
from sbtk_runtime.gallery.postgres_connection import Session
from sbtk_runtime.gallery.push import push_gallery
from sbtk_runtime.gallery.remote import RemoteError, RemoteUnavailable, open_store
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from sbtk_runtime.gallery.remote_postgres import _Reading
from sbtk_runtime.gallery.update import update_gallery
from tests.postgres_server import NEEDS_POSTGRES, PASSWORD, PLAIN_PASSWORD, PostgresServer
from tests.runtime.gallery.test_dates import IN_MAY, MAY, PHOTOS, write_dated
from tests.tiny import tiny_bundle
from tests.tiny_gallery import gallery_of, unit_rows
from tests.tiny_remote import POSTGRES, push, server_fixture

pytestmark = NEEDS_POSTGRES

server = server_fixture(POSTGRES)
COUNT, DIM = 60, 16


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 60 random rows below /photos, ten to a folder."""
    folder = tmp_path_factory.mktemp("made-up") / "g.sbtk"
    gallery_of(folder, unit_rows(COUNT, DIM))
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    with Embedder(tiny_bundle(tmp_path_factory.mktemp("bundle"), DIM), threads=1) as opened:
        yield opened


def test_pushing_again_changes_nothing(url: str, made_up: Path, server: PostgresServer) -> None:
    push(made_up, url)
    database = url.split("/")[-1]
    before = server.execute("SELECT xmin::text, * FROM sbtk ORDER BY id", database)
    report = push(made_up, url)
    assert (report.pushed, report.unchanged, report.deleted) == (0, COUNT, 0)
    assert server.execute("SELECT xmin::text, * FROM sbtk ORDER BY id", database) == before


@pytest.mark.kill
def test_a_server_that_stands_still_does_not_hold_anybody(
    url: str, made_up: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "limit_s", 2.0)
    frozen: list[int] = []

    def thaw() -> None:
        time.sleep(6)
        server.thaw()

    def progress(done: int, total: int) -> None:
        if done >= 20 and not frozen:
            frozen.append(done)
            server.freeze()
            threading.Thread(target=thaw).start()

    report = push_gallery(
        made_up, open_store(url, patience_s=90), "nas", progress=progress, batch=10
    )
    assert frozen and report.pushed == COUNT
    assert push(made_up, url).unchanged == COUNT
    query = unit_rows(1, DIM)[0]
    with RemoteGallery.open(url, patience_s=0) as there:
        assert len(there.answer(query, 1).hits) == 1
        monkeypatch.setattr(_Reading, "limit_s", 1.0)
        server.freeze()
        try:
            with pytest.raises(RemoteUnavailable, match="did not answer within 1 s"):
                there.answer(query, 1)
        finally:
            server.thaw()
        assert len(there.answer(query, 1).hits) == 1


def test_a_full_disk_for_temporary_files_is_named(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "small")]
    (tmp_path / "small").mkdir()
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        gallery_of(tmp_path / "g.sbtk", unit_rows(3000, DIM), commit_every=1000)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "small"))
        with pytest.raises(DiskFull, match=f"no space left while writing {tmp_path}/small/"):
            push(tmp_path / "g.sbtk", url)
        monkeypatch.undo()
        assert push(tmp_path / "g.sbtk", url).pushed == 3000
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "small")], check=True)


def test_a_server_with_too_many_connections_is_told_from_one_that_is_down(
    url: str, made_up: Path, server: PostgresServer
) -> None:
    push(made_up, url)
    server.execute(f"CREATE ROLE few LOGIN PASSWORD '{PLAIN_PASSWORD}' CONNECTION LIMIT 0")
    try:
        with pytest.raises(RemoteUnavailable, match="too many connections") as caught:
            RemoteGallery.open(url.replace("admin:", "few:"), patience_s=0)
    finally:
        server.execute("DROP ROLE few")
    assert "does not answer" not in str(caught.value)
    assert "CONNECTION LIMIT" in caught.value.next_step


def test_a_source_cannot_name_files_outside_of_its_folder(
    url: str, made_up: Path, server: PostgresServer
) -> None:
    push(made_up, url)
    statement = "UPDATE sbtk SET path = '../../etc/passwd', source = '/etc' WHERE id = {}"
    with RemoteGallery.open(url) as there:
        first = there.recent(1)[0].photo.id
    server.execute("UPDATE sbtk_parts SET source = '/etc'", url.split("/")[-1])
    server.execute(statement.format(first), url.split("/")[-1])
    for mounts in (None, {"/etc": "/srv/photos"}):
        with RemoteGallery.open(url, mounts) as there:
            photo = there.photo(first)
            assert photo is not None and photo.path == "source:/etc/../../etc/passwd"


def _refusal(call: object, *arguments: object) -> str:
    with pytest.raises(SbtkError) as caught:
        call(*arguments)  # type: ignore[operator]
    text = str(caught.value)
    assert PASSWORD not in text and PLAIN_PASSWORD not in text
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    return text


def test_errors_are_clear_sentences(
    server: PostgresServer, url: str, made_up: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_quickly = lambda where: RemoteGallery.open(where, patience_s=0)  # noqa: E731
    assert "there is no collection 'sbtk'" in _refusal(open_quickly, url)
    assert "sbtk push GALLERY" in _refusal(open_quickly, url)
    nowhere = server.url("nowhere")
    for call in (open_quickly, lambda where: push(made_up, where, patience_s=0)):
        text = _refusal(call, nowhere)
        assert 'database "nowhere" does not exist' in text and "createdb" in text
        down = f"postgresql://admin:{PASSWORD}@127.0.0.1:1/x"
        assert "does not answer: connection failed" in _refusal(call, down)
        assert "failed to resolve host" in _refusal(call, "postgresql://no.invalid/x")
        assert "SSL was required" in _refusal(call, f"{url}?sslmode=require")
        wrong = url.replace("admin:", "admin:wrong-")
        assert "password authentication failed" in _refusal(call, wrong)
        assert "PGPASSWORD" in _refusal(call, wrong)
        assert 'parameter: "foo"' in _refusal(call, f"{url}?foo=1")
        assert 'invalid sslmode value: "on"' in _refusal(call, f"{url}?sslmode=on")
    monkeypatch.setenv("PGPASSWORD", PLAIN_PASSWORD)
    push(made_up, url.replace(f":{PASSWORD}@", "@"))


def test_what_cannot_pass_is_not_tried_again(url: str, made_up: Path) -> None:
    for wrong in ("sslmode=require", "sslmode=on", "foo=1"):
        with pytest.raises(RemoteError) as caught:
            push(made_up, f"{url}?{wrong}", patience_s=600)
        assert not isinstance(caught.value, RemoteUnavailable)


def test_tables_of_other_programs_are_left_as_they_are(
    server: PostgresServer, url: str, made_up: Path
) -> None:
    database = url.split("/")[-1]
    for statement in (
        *("CREATE TABLE one (x int)", "CREATE TABLE two_info (x int)"),
        *("CREATE TABLE three_parts (x int)", "CREATE VIEW four AS SELECT 1"),
    ):
        server.execute(statement, database)
        name = statement.split()[2].partition("_")[0]
        text = _refusal(push, made_up, f"{url}?collection={name}")
        assert "another program uses the name" in text and "?collection=NAME" in text
    listed = server.execute("SELECT relname FROM pg_class WHERE relkind IN ('r', 'v')", database)
    ours = {name for (name,) in listed if name.split("_")[0] in ("one", "two", "three", "four")}
    assert ours == {"one", "two_info", "three_parts", "four"}
    server.execute("ALTER ROLE admin SET search_path = nowhere")
    try:
        assert "CREATE SCHEMA" in _refusal(push, made_up, url)
    finally:
        server.execute("ALTER ROLE admin RESET search_path")


def test_a_read_only_role_can_query_but_not_push(
    server: PostgresServer, url: str, made_up: Path, tmp_path: Path
) -> None:
    push(made_up, url)
    database = url.split("/")[-1]
    server.execute("DROP ROLE IF EXISTS reader")
    server.execute(f"CREATE ROLE reader LOGIN PASSWORD '{PLAIN_PASSWORD}'")
    server.execute("GRANT SELECT ON sbtk, sbtk_info, sbtk_parts TO reader", database)
    reader = server.url(database, "reader")
    with RemoteGallery.open(reader) as there:
        assert len(there.answer(unit_rows(1, DIM)[0], 5).hits) == 5
    other = tmp_path / "other.sbtk"
    gallery_of(other, unit_rows(70, DIM))
    text = _refusal(push, other, reader)
    assert "permission denied" in text and "GRANT ALL ON sbtk" in text
    assert "permission denied for schema" in _refusal(push, made_up, f"{reader}?collection=new")
    server.execute("ALTER ROLE reader SET default_transaction_read_only = on")
    assert "only reads" in _refusal(push, other, reader)


def test_the_extension_is_created_or_the_error_gives_the_sql(
    server: PostgresServer, url: str, made_up: Path
) -> None:
    database = url.split("/")[-1]
    server.execute("DROP ROLE IF EXISTS plain")
    server.execute(f"CREATE ROLE plain LOGIN PASSWORD '{PLAIN_PASSWORD}'")
    server.execute("GRANT CREATE ON SCHEMA public TO plain", database)
    text = _refusal(push, made_up, server.url(database, "plain"))
    assert "permission denied to create extension" in text
    assert "as a superuser: CREATE EXTENSION vector;" in text
    server.execute("CREATE EXTENSION vector", database)
    assert push(made_up, server.url(database, "plain")).pushed == COUNT


def test_a_server_without_pgvector_is_named(made_up: Path) -> None:
    server = PostgresServer(has_pgvector=False)
    try:
        text = _refusal(push, made_up, server.url())
        assert "has no pgvector" in text and "CREATE EXTENSION vector;" in text
    finally:
        server.close()


def test_the_index_finds_the_hits_of_exact_search(
    url: str, tmp_path: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "EXACT_BELOW", 100)
    monkeypatch.setattr("sbtk_runtime.gallery.remote_postgres.EXACT_BELOW", 100)
    gallery_of(tmp_path / "g.sbtk", unit_rows(2000, DIM), commit_every=500)
    said: list[str] = []
    push_gallery(tmp_path / "g.sbtk", open_store(url), "nas", notify=said.append)
    assert any("building the index of 2,000 photos" in text for text in said)
    indices = server.execute("SELECT indexname FROM pg_indexes", url.split("/")[-1])
    assert ("sbtk_by_embedding",) in indices
    with RemoteGallery.open(url) as there:
        for query in unit_rows(20, DIM, seed=8):
            for under in (None, "nas", "nas/0004"):
                exact = there.answer(query, 10, "exact", under=under, fold=False)
                by_index = there.answer(query, 10, "hnsw", under=under, fold=False)
                assert by_index.hits == exact.hits


def test_older_collections_support_periods_after_the_next_push(
    server: PostgresServer, url: str, tmp_path: Path, embedder: Embedder
) -> None:
    photos = write_dated(tmp_path / "photos")
    update_gallery(tmp_path / "g.sbtk", [photos], embedder)
    push(tmp_path / "g.sbtk", url)
    database = url.split("/")[-1]
    # As an older version made it: without dates, and with stamps that know of none.
    server.execute("ALTER TABLE sbtk DROP COLUMN taken", database)
    server.execute("ALTER TABLE sbtk_parts DROP COLUMN has_dates", database)
    server.execute("UPDATE sbtk SET stamp = 0", database)
    query = unit_rows(1, DIM)[0]
    with RemoteGallery.open(url) as there:
        assert len(there.answer(query, 99).hits) == len(PHOTOS)
        for under in (None, "nas"):
            with pytest.raises(BadConfig) as caught:
                there.answer(query, 3, taken=MAY, under=under)
            assert "pushed nas without dates" in str(caught.value)
            assert "sbtk push GALLERY again" in str(caught.value)
    assert push(tmp_path / "g.sbtk", url).pushed == len(PHOTOS)
    with RemoteGallery.open(url) as there:
        assert {Path(hit.path).name for hit in there.answer(query, 99, taken=MAY).hits} == IN_MAY
