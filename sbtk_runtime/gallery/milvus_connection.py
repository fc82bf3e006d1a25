"""Connections to Milvus, the pages of what it returns, and what its errors mean."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
from pymilvus import MilvusClient
from pymilvus.exceptions import DataNotMatchException, MilvusException, ParamError

from sbtk_runtime.gallery.photo_filter import EVER, PeriodBounds
from sbtk_runtime.gallery.remote import (
    Notify,
    RemoteError,
    RemoteFilter,
    RemoteUnavailable,
    retrying,
)
from sbtk_runtime.gallery.remote_address import Address

Row = dict[str, Any]
Result = TypeVar("Result")

#: How long an answer is waited for, and how long until a collection is made or in memory.
ANSWER_S, READY_S = 30, 300
#: The most rows that Milvus returns at once.
MOST_ROWS = 16_384
_CONNECT_S = 10
_TLS_S = 3
_PORT = 19530
# So many rows of embeddings are some 10 MB.
_PAGE_ROWS = 4096
_MOST_HASH = (1 << 63) - 1

# Codes of errors, see pkg/util/merr/errors.go in Milvus.
_NO_COLLECTION, _NO_DATABASE = 100, 800
_NOT_LOADED = {101, 103}
_FULL = {3: "memory", 7: "disk"}
#: What may pass: it starts, ends, moves collections between its nodes, or has too much to do.
_PASSING = {1, 2, 4, 8, 400, 401, 403, 503, 901}
_PASSING_TEXTS = ("not ready", "not healthy", "unhealthy", "no available", "node offline")
_GRPC_PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
_GRPC_REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}

# What gRPC says of TLS: what it means, and what to do about it.
_TLS = {
    "CERTIFICATE_VERIFY_FAILED": (
        "",
        "set GRPC_DEFAULT_SSL_ROOTS_FILE_PATH to the file with a private authority's certificate",
    ),
    "Hostname Verification": (
        "its certificate is for another host",
        "name the host in --at as its certificate does",
    ),
    "create security handshaker": (
        "the file that GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names has no certificates",
        "set GRPC_DEFAULT_SSL_ROOTS_FILE_PATH to a PEM file",
    ),
    "WRONG_VERSION_NUMBER": (
        "the server has no TLS",
        "write milvus:// for https:// in --at, or turn on the server's tlsMode",
    ),
}

# Its loggers write each error with a traceback to standard error.
for _name in ("pymilvus", "pymilvus.milvus_client"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


class MilvusConnection:
    """A client, made when it is first used. Thread-safe.

    Args:
        address: of the server.
        patience_s: for how long requests to a server that does not answer are repeated.
        notify: called with a sentence when the server ceases to answer.
    """

    def __init__(self, address: Address, patience_s: float, notify: Notify | None = None) -> None:
        self.address = address
        self._patience_s = patience_s
        self._notify = notify
        self._is_told = False
        self._made: MilvusClient | None = None
        self._lock = threading.Lock()

    def run(self, work: Callable[[MilvusClient], Result], collection: str | None = None) -> Result:
        """Return what `work` returns, which is repeated while the server does not answer.

        Args:
            work: what the client is to do.
            collection: is loaded if the server says that it is not, after a restart for example.
        """

        def attempt() -> Result:
            with translated_errors(self.address):
                client = self._client()
                try:
                    return work(client)
                except MilvusException as problem:
                    if collection is None or problem.code not in _NOT_LOADED:
                        raise
                    client.load_collection(collection, timeout=READY_S)
                    return work(client)

        result = retrying(attempt, self._patience_s, self._tell)
        self._is_told = False
        return result

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._made is not None:
                with contextlib.suppress(MilvusException, grpc.RpcError):
                    self._made.close()
                self._made = None

    def rows(
        self,
        collection: str,
        where: str,
        fields: Sequence[str],
        *,
        consistency: str = "Bounded",
        low: int = 0,
        high: int = _MOST_HASH,
    ) -> Iterator[list[Row]]:
        """Yield the rows that meet a condition, in pages and any order.

        The collection has the field `path_hash`, by whose halves the rows are divided until a page
        holds them.

        Args:
            collection: its name.
            where: the condition.
            fields: of the rows.
            consistency: `Strong` to see all that was written before.
            low: least `path_hash`.
            high: greatest `path_hash`.
        """
        span = f"({where}) and path_hash >= {low} and path_hash <= {high}"
        limit = MOST_ROWS if low == high else _PAGE_ROWS
        page = self.query(collection, span, fields, consistency=consistency, limit=limit)
        if len(page) < limit or low == high:
            yield page
            return
        count = self.count(collection, span, consistency=consistency)
        parts = min(max(2, 2 * count // _PAGE_ROWS), high - low + 1)
        edges = [low + (high + 1 - low) * part // parts for part in range(parts + 1)]
        for first, end in itertools.pairwise(edges):
            yield from self.rows(
                *(collection, where, fields), consistency=consistency, low=first, high=end - 1
            )

    def query(
        self,
        collection: str,
        where: str,
        fields: Sequence[str],
        *,
        consistency: str = "Bounded",
        limit: int = MOST_ROWS,
    ) -> list[Row]:
        """Return at most `limit` rows that meet a condition."""
        return self.run(
            lambda client: list(
                client.query(
                    *(collection, where),
                    output_fields=list(fields),
                    limit=limit,
                    consistency_level=consistency,
                    timeout=ANSWER_S,
                )
            ),
            collection,
        )

    def count(self, collection: str, where: str, *, consistency: str = "Bounded") -> int:
        """Return the number of rows that meet a condition; all, if it is empty."""
        found = self.run(
            lambda client: client.query(
                *(collection, where),
                output_fields=["count(*)"],
                consistency_level=consistency,
                timeout=ANSWER_S,
            ),
            collection,
        )
        return int(found[0]["count(*)"]) if found else 0

    def upsert(self, collection: str, rows: list[Row]) -> None:
        """Insert or replace rows, all in one request."""
        self.run(lambda client: client.upsert(collection, rows, timeout=ANSWER_S), collection)

    def delete(self, collection: str, where: str) -> None:
        """Delete the rows that meet a condition."""
        self.run(
            lambda client: client.delete(collection, filter=where, timeout=ANSWER_S), collection
        )

    def _tell(self, text: str) -> None:
        # Once for all threads, until the server answers.
        if self._notify is not None and not self._is_told:
            self._is_told = True
            self._notify(text)

    def _client(self) -> MilvusClient:
        with self._lock:
            if self._made is None:
                self._made = MilvusClient(
                    uri=self.address.url,
                    token=self.address.token,
                    db_name=self.address.database,
                    timeout=_CONNECT_S,
                    dedicated=True,
                )
            return self._made


def quoted(text: str) -> str:
    """Return a text as a condition has it."""
    return json.dumps(text, ensure_ascii=False)


def condition(among: RemoteFilter) -> str:
    """Return the condition for rows of photos that a filter accepts."""
    parts = ["path_hash >= 0"]
    places = []
    for place in among.places:
        text = f"source == {quoted(place.source)}"
        if (interval := place.interval()) is not None:
            low, high = map(quoted, interval)
            text += f" and path >= {low} and path < {high}"
        places.append(f"({text})")
    if places:
        parts.append(f"({' or '.join(places)})")
    if among.period != EVER:
        first, end, first_ns, last_ns = PeriodBounds.of(among.period)
        dated = f'taken != "" and taken >= {quoted(first)} and taken < {quoted(end)}'
        undated = f'taken == "" and mtime_ns >= {first_ns} and mtime_ns <= {last_ns}'
        parts.append(f"(({dated}) or ({undated}))")
    return " and ".join(parts)


@contextlib.contextmanager
def translated_errors(address: Address) -> Iterator[None]:
    """Raise what a failure of the server or the connection means, without secrets."""
    try:
        yield
    # The library's messages are not chained: they may quote a token.
    except MilvusException as problem:
        if isinstance(code := problem.code, grpc.StatusCode):
            raise _of_transport(code, str(problem.message), address, ANSWER_S) from None
        if isinstance(cause := problem.__cause__, grpc.RpcError):  # while connecting
            raise _of_transport(cause.code(), str(cause.details()), address, _CONNECT_S) from None
        raise _of_server(problem, address) from None
    except grpc.RpcError as problem:
        code, text = problem.code(), str(problem.details())
        raise _of_transport(code, text, address, ANSWER_S) from None
    except ValueError as problem:
        # gRPC's word for a client that another thread closed.
        raise RemoteUnavailable(
            f"{address.shown} does not answer: {address.masked(str(problem))}"
        ) from None


def _of_server(problem: MilvusException, address: Address) -> RemoteError:
    shown, text = address.shown, address.masked(str(problem.message))
    code = int(problem.code)
    if isinstance(problem, ParamError | DataNotMatchException):  # which the client finds
        return RemoteError(f"{shown} cannot take a request: {text}", "Milvus 2.3 or newer")
    if code == _NO_COLLECTION:
        return RemoteError(
            f"there is no collection {address.collection!r} in {shown}",
            "one that 'sbtk push' has made",
            "sbtk push GALLERY --at URL",
        )
    if code == _NO_DATABASE or re.search(r"database\b.*not found", text):
        return RemoteError(
            f"{shown} has no such database: {text}",
            "one that exists",
            "correct the name after the last / of --at, or leave it out",
        )
    if code in _FULL or "quota" in text:
        return RemoteError(
            f"the {_FULL.get(code, 'quota')} of {shown} is full: {text}",
            "",
            "make room there, then run the same command again: it resumes",
        )
    if any(word in text for word in ("auth check failure", "authenticat", "PermissionDenied")):
        return _refused(text, address)
    if code in _NOT_LOADED:
        return RemoteUnavailable(
            f"{shown} has not loaded the collection into its memory yet: {text}", "", "try again"
        )
    lowered = text.lower()
    if code in _PASSING or problem.retriable or any(one in lowered for one in _PASSING_TEXTS):
        return RemoteUnavailable(
            f"{shown} does not answer: {text}", "", "start the server, or correct --at"
        )
    if "timeout" in lowered:
        return RemoteUnavailable(f"{shown} did not answer within {ANSWER_S} s: {text}")
    return RemoteError(f"{shown} refuses: {text}")


def _of_transport(code: grpc.StatusCode, text: str, address: Address, limit_s: int) -> RemoteError:
    shown, text = address.shown, address.masked(text).rpartition("last error: ")[2]
    for words, (meaning, remedy) in _TLS.items():
        if words in text:
            return RemoteError(f"no secure connection to {shown}: {meaning or text}", "", remedy)
    if code in _GRPC_PASSING and (wants_tls := _without_tls(address)):
        return wants_tls
    if "Failed parsing HTTP/2" in text or "http2 header with status" in text:
        return RemoteError(
            f"{shown} is not a Milvus server: {text}", "Milvus 2.3 or newer", "correct --at"
        )
    if "hostname lookup" in text:
        return RemoteError(f"there is no such host: {text}", "", "correct the host in --at")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return RemoteUnavailable(
            f"{shown} did not answer within {limit_s} s: {text}",
            "",
            "start the server, or correct --at",
        )
    if code in _GRPC_REFUSED or "auth" in text:
        return _refused(text, address)
    if code in _GRPC_PASSING:
        return RemoteUnavailable(
            f"{shown} does not answer: {text}", "", "start the server, or correct --at"
        )
    return RemoteError(f"{shown} refuses: {text}", "Milvus 2.3 or newer")


def _without_tls(address: Address) -> RemoteError | None:
    """Return the error for a URL without TLS if its server uses TLS, else `None`.

    gRPC only says that such a server closed the connection, as one that starts does.
    """
    parts = urlsplit(address.url)
    if parts.scheme == "https":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nothing is sent, so it does not matter whose certificate it is.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    place = parts.hostname, parts.port or _PORT
    try:
        with (
            socket.create_connection(place, timeout=_TLS_S) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname),
        ):
            pass
    except (OSError, ValueError):
        return None
    shown_scheme = address.shown.partition(":")[0]
    remedy = f"write https:// for {shown_scheme}:// in --at"
    if parts.port is None:
        remedy += f", and :{_PORT} after the host"
    return RemoteError(f"{address.shown} takes connections with TLS only", "", remedy)


def _refused(text: str, address: Address) -> RemoteError:
    return RemoteError(
        f"{address.shown} refuses: {text}",
        "a user with the privileges of this command",
        "grant the user this privilege, or set SBTK_TOKEN to another USER:PASSWORD or API key"
        if "permission deny" in text
        else "set SBTK_TOKEN to USER:PASSWORD or to an API key",
    )
