"""Milvus itself: what milvus-lite does not have, and galleries as in any engine.

The tests share one server, which starts in some ten seconds; each collection takes seconds to make.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.gallery.queries import Search
from sbtk_runtime.gallery.remote import RemoteError, RemoteUnavailable, open_store
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from tests.milvus_server import NEEDS_MILVUS, TOKEN, MilvusServer
from tests.runtime.gallery.test_remote_engines import (  # noqa: F401
    embedder,
    made_up,
    photos,
    test_a_binary_collection_gives_the_hits_of_its_gallery,
    test_periods_give_the_hits_of_the_gallery,
    test_unusual_paths_survive_a_push,
)
from tests.runtime.gallery.test_remote_large import (  # noqa: F401
    test_a_large_collection_follows_changes_and_survives_a_restart,
    test_a_large_collection_of_codes_follows_changes,
)
from tests.runtime.gallery.test_remote_regions import (  # noqa: F401
    region_embedder,
    region_gallery,
    region_photos,
    test_regions_give_the_hits_of_the_gallery,
)
from tests.runtime.gallery.test_remote_sources import (  # noqa: F401
    test_a_source_is_removed_for_good_and_others_stay,
)
from tests.tiny_gallery import gallery_of, unit_rows
from tests.tiny_remote import MILVUS, push, server_fixture
from tests.tls import NEEDS_OPENSSL, Certificate

pytestmark = [pytest.mark.slow, NEEDS_MILVUS]

server = server_fixture(MILVUS)
DIM = 16
_WAYS: tuple[Search, ...] = ("auto", "exact")


def _refusal(url: str, pushed: Path | None = None) -> str:
    with pytest.raises(SbtkError) as caught:
        if pushed is None:
            RemoteGallery.open(url, patience_s=0)
        else:
            push(pushed, url, patience_s=0)
    text = str(caught.value)
    for secret in (TOKEN, TOKEN.partition(":")[2] + "-wrong", "apikey"):
        assert secret not in text
    # No message of the library, which may have them, is shown with it.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def test_errors_are_clear_sentences(
    server: MilvusServer,
    made_up: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert "there is no collection 'sbtk'" in _refusal(server.url())
    assert "has no such database" in _refusal(server.url("nowhere"), made_up)
    for wrong in (
        server.url().replace(TOKEN, f"{TOKEN}-wrong"),
        server.url().replace(TOKEN, "apikey"),
        server.url().replace(f"{TOKEN}@", ""),
    ):
        assert "SBTK_TOKEN" in _refusal(wrong)
    assert "does not answer" in _refusal(f"milvus://{TOKEN}@127.0.0.1:1")
    with_tls = server.url().replace("milvus:", "https:")
    for pushed in (None, made_up):
        text = _refusal(with_tls, pushed)
        assert "the server has no TLS" in text and "write milvus:// for https://" in text
    assert "there is no such host" in _refusal("milvus://no.invalid")
    # The library's tracebacks are not shown.
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("SBTK_TOKEN", TOKEN)
    assert "there is no collection" in _refusal(server.url().replace(f"{TOKEN}@", ""))


def test_a_reader_can_query_but_not_push(
    server: MilvusServer,
    url: str,
    made_up: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    push(made_up, url)
    database = url.split("/")[-1]
    with contextlib.closing(server.client(database)) as client:
        client.create_user("reader", "Read-0nly")
        client.create_role("reading")
        for collection in ("sbtk", "sbtk_info"):
            for privilege in ("Query", "Search"):
                client.grant_privilege("reading", "Collection", privilege, collection, database)
        client.grant_role("reader", "reading")
    reader = url.replace(TOKEN, "reader:Read-0nly")
    ends = time.monotonic() + 60
    while True:  # Milvus passes grants on in the background
        try:
            with RemoteGallery.open(reader) as there:
                hits = [there.answer(unit_rows(1, DIM)[0], 5, way).hits for way in _WAYS]
            break
        except RemoteError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.2)
    assert [len(found) for found in hits] == [5, 5]
    gallery_of(tmp_path / "other.sbtk", unit_rows(70, DIM))
    text = _refusal(reader, tmp_path / "other.sbtk")
    assert "permission deny" in text and "grant the user this privilege" in text
    with RemoteGallery.open(url) as there:
        assert len(there) == 60


def test_collections_of_other_programs_are_left_as_they_are(
    server: MilvusServer,
    url: str,
    made_up: Path,  # noqa: F811
) -> None:
    with contextlib.closing(server.client(url.split("/")[-1])) as client:
        for name in ("one", "two_info"):
            client.create_collection(name, dimension=4)
            text = _refusal(f"{url}?collection={name.partition('_')[0]}", made_up)
            assert "another program uses the name" in text and "?collection=NAME" in text
            assert client.get_collection_stats(name)["row_count"] == 0


_PUSH_AND_QUERY = """
import sys
import time
from pathlib import Path
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from tests.tiny_gallery import unit_rows
from tests.tiny_remote import push

for url in sys.argv[2:]:
    try:
        push(Path(sys.argv[1]), url, patience_s=600)
        with RemoteGallery.open(url) as there:
            print(len(there.answer(unit_rows(1, 16)[0], 3).hits), "hits")
    except SbtkError as problem:
        print(" ".join(str(problem).split()))
"""


@NEEDS_OPENSSL
def test_connections_are_safe_where_the_url_says_so(
    made_up: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    certificate, other = (Certificate.make(tmp_path / name) for name in ("own", "other"))

    def answers(authorities: Path, *urls: str) -> list[str]:
        # Processes, as gRPC reads the variable once in each.
        done = subprocess.run(
            [sys.executable, "-c", _PUSH_AND_QUERY, str(made_up), *urls],
            env=os.environ | {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(authorities)},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
        )
        assert TOKEN not in done.stdout and not done.stderr
        return done.stdout.splitlines()

    server = MilvusServer(certificate)
    try:
        url = server.url()
        plain = [url.replace("https:", scheme) for scheme in ("http:", "milvus:")]
        # This address leads to this machine, too, and is not in the certificate.
        misnamed = url.replace("127.0.0.1", "0.0.0.0")
        hits, *refused = answers(certificate.authority, url, misnamed, *plain)
        assert hits == "3 hits"
        (untrusted,) = answers(other.authority, url)
        (unreadable,) = answers(made_up / "manifest.json", url)
    finally:
        server.close()
    shown = f"https://root@127.0.0.1:{server.port}"
    assert f"no secure connection to {shown}" in untrusted
    assert "CERTIFICATE_VERIFY_FAILED" in untrusted
    assert "names has no certificates" in unreadable
    assert "name the host in --at as its certificate does" in refused[0]
    for text, scheme in zip(refused[1:], ("http", "milvus"), strict=True):
        assert text.endswith(f"with TLS only next: write https:// for {scheme}:// in --at")


def test_a_server_that_does_not_answer_times_out(
    server: MilvusServer,
    url: str,
    made_up: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push(made_up, url)
    for module in ("milvus_connection", "milvus_collections"):
        monkeypatch.setattr(f"sbtk_runtime.gallery.{module}.ANSWER_S", 2)
    with RemoteGallery.open(url, patience_s=0) as there:
        query = unit_rows(1, DIM)[0]
        assert len(there.answer(query, 3).hits) == 3
        server.freeze()
        try:
            with pytest.raises(RemoteUnavailable, match="did not answer within"):
                there.answer(query, 3)
        finally:
            server.thaw()
        assert len(there.answer(query, 3).hits) == 3
        assert open_store(url).address.shown == there.name
