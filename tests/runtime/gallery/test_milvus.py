"""Milvus itself: what milvus-lite does not have, and galleries as in any engine.

The tests share one server, which starts in some ten seconds; each collection takes seconds to make.
"""

from __future__ import annotations

from collections.abc import Iterator
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
)
from tests.runtime.gallery.test_remote_regions import (  # noqa: F401
    region_embedder,
    region_gallery,
    region_photos,
    test_regions_give_the_hits_of_the_gallery,
)
from tests.tiny_gallery import unit_rows
from tests.tiny_remote import push

pytestmark = [pytest.mark.slow, NEEDS_MILVUS]

DIM = 16


@pytest.fixture(scope="module")
def server() -> Iterator[MilvusServer]:
    started = MilvusServer()
    yield started
    started.close()


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
    assert "does not answer" in _refusal(f"https://{TOKEN}@127.0.0.1:{server.port}")
    # The library's tracebacks are not shown.
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("SBTK_TOKEN", TOKEN)
    assert "there is no collection" in _refusal(server.url().replace(f"{TOKEN}@", ""))


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
