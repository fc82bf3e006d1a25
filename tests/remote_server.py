"""The engines that tests of collections run on."""

from __future__ import annotations

import pytest

from tests.milvus_server import NEEDS_LITE, LiteServer, MilvusServer
from tests.postgres_server import NEEDS_POSTGRES, PostgresServer

Server = PostgresServer | MilvusServer
ENGINES = [
    pytest.param(PostgresServer, id="postgres", marks=NEEDS_POSTGRES),
    pytest.param(LiteServer, id="milvus-lite", marks=NEEDS_LITE),
]
