"""Milvus itself: what milvus-lite does not have, and galleries as in any engine.

The tests share one server, which starts in some ten seconds; each collection takes seconds to make.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.gallery.remote import RemoteUnavailable, open_store
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
from tests.tiny_gallery import unit_rows
from tests.tiny_remote import MILVUS, push, server_fixture
from tests.tls import NEEDS_OPENSSL, Certificate

pytestmark = [pytest.mark.slow, NEEDS_MILVUS]

server = server_fixture(MILVUS)
DIM = 16


def _refusal(url: str, pushed: Path | None = None) -> str:
    with pytest.raises(SbtkError) as caught:
        if pushed is None:
            RemoteGallery.open(url, patience_s=0)
        else:
            push(pushed, url, patience_s=0)
    text = str(caught.value)
    for secret in (TOKEN, TOKEN.partition(":")[2] + "-wrong", "apikey"):
        assert secret not in text
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
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
    assert "expected: a server with TLS" in _refusal(with_tls)
    # The library's tracebacks are not shown.
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("SBTK_TOKEN", TOKEN)
    assert "there is no collection" in _refusal(server.url().replace(f"{TOKEN}@", ""))


@NEEDS_OPENSSL
def test_a_collection_is_pushed_and_queried_over_tls(
    made_up: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    certificate, other = (Certificate.make(tmp_path / name) for name in ("own", "other"))
    server = MilvusServer(certificate)
    code = (
        "import sys; from pathlib import Path; from tests.tiny_gallery import unit_rows; "
        "from tests.tiny_remote import push; "
        "from sbtk_runtime.gallery.remote_gallery import RemoteGallery; "
        "url = sys.argv[1]; push(Path(sys.argv[2]), url); "
        "there = RemoteGallery.open(url); print(len(there.answer(unit_rows(1, 16)[0], 3).hits))"
    )
    try:
        # Processes, as gRPC reads the variable once in each.
        done, refused = (
            subprocess.run(
                [sys.executable, "-c", code, server.url(), str(made_up)],
                env=os.environ | {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(trusted.authority)},
                cwd=Path(__file__).parents[3],
                capture_output=True,
                text=True,
            )
            for trusted in (certificate, other)
        )
    finally:
        server.close()
    assert done.stdout == "3\n", done.stderr
    assert "no secure connection to https://root@127.0.0.1:" in refused.stderr
    assert "CERTIFICATE_VERIFY_FAILED" in refused.stderr and TOKEN not in refused.stderr


def test_a_server_that_does_not_answer_times_out(
    server: MilvusServer,
    url: str,
    made_up: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push(made_up, url)
    for module in ("milvus_connection", "milvus_rows"):
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
