"""Runs the app on a socket until it is told to stop."""

from __future__ import annotations

import os
import socket
from concurrent.futures import Future

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from sbtk_runtime.web.access_rules import AccessRules
from sbtk_runtime.web.app import guarded_app
from sbtk_runtime.web.connection import GuardedProtocol, accepted_at_once, connection_limit
from sbtk_runtime.web.service import Service

# What is under way when the server is told to stop may take so long; then it is given up.
_LAST_ANSWERS_S = 3


def serve(service: Service, listening: socket.socket, rules: AccessRules) -> None:
    """Answers for `service`, which may still be loading, until SIGINT or SIGTERM.

    Raises:
        KeyboardInterrupt: it was told to stop; what was under way has been answered, or refused.
        SbtkError: the service cannot be loaded.
    """
    is_debugged = bool(os.environ.get("SBTK_DEBUG"))
    GuardedProtocol.limit = connection_limit()
    config = uvicorn.Config(
        guarded_app(service, rules),
        http=GuardedProtocol,
        backlog=accepted_at_once(GuardedProtocol.limit),
        ws="none",
        loop="asyncio",
        lifespan="off",
        # Of what goes wrong `FaultsTold` tells; uvicorn would add tracebacks.
        log_config=LOGGING_CONFIG if is_debugged else None,
        log_level="info" if is_debugged else "critical",
        access_log=False,
        server_header=False,
        # The guard judges by the Host header alone, and nothing here goes by the client's address.
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    )
    server = uvicorn.Server(config)

    def stop_if_failed(loaded: Future[None]) -> None:
        if loaded.exception() is not None:
            server.should_exit = True

    service.loaded.add_done_callback(stop_if_failed)
    server.run([listening])
    service.loaded.result()
