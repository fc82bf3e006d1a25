"""Collections in real databases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.milvus_server import MilvusServer
from tests.tiny_remote import LITE, POSTGRES, Server, server_fixture

server = server_fixture(POSTGRES, LITE)


@pytest.fixture
def url(
    server: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URL of an empty database."""
    if isinstance(server, MilvusServer):
        # What a push that was killed has left is given up sooner.
        monkeypatch.setattr("sbtk_runtime.gallery.remote_milvus.LEASE_S", 3.0)
        monkeypatch.setattr("sbtk_runtime.gallery.remote_milvus._BEAT_S", 0.3)
    name = f"db{abs(hash(request.node.name)) % 10**9}"
    yield server.make_database(name)
    server.drop_database(name)
