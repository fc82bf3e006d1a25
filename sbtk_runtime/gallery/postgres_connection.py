"""Connections to PostgreSQL that are made again when they are lost, and what its errors mean."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import psycopg
from pgvector.psycopg import register_vector

from sbtk_runtime.gallery.remote import (
    Notify,
    RemoteError,
    RemoteUnavailable,
    of_another_program,
    retrying,
)
from sbtk_runtime.gallery.remote_address import Address

Connection = psycopg.Connection[Any]
Result = TypeVar("Result")

#: How long an answer to a query, or a lock, is waited for.
ANSWER_S = 30
_CONNECT_S = 10
#: What libpq says of TLS, and what to do about it.
_TLS = {
    "does not support SSL": "leave sslmode out of --at, or turn ssl on in its postgresql.conf",
    "no encryption": "write ?sslmode=require in --at",
    "does not match host name": "name the host in --at as its certificate does",
    "certificate": "name the file with its authority's certificate: ?sslrootcert=FILE in --at",
}
#: There are tables, columns or types other than sbtk's.
_OTHER_TABLES = {"42P07", "42703", "42804", "42809"}
#: What may pass: the server starts, ends, has too many connections, or two of us collided.
_PASSING = {"57P01", "57P02", "57P03", "40P01", "40001", "55P03"}


class Session:
    """One connection at a time, reopened after it was lost.

    A server that stands still keeps the connection open, so a transaction that takes too long is
    ended from here.

    Args:
        address: of the server.
        patience_s: for how long transactions with a server that does not answer are repeated.
        notify: called with a sentence before the first repetition of each.
    """

    #: The most seconds of a transaction.
    limit_s: float = 600

    def __init__(self, address: Address, patience_s: float, notify: Notify | None = None) -> None:
        self._address = address
        self._patience_s = patience_s
        self._notify = notify
        self._connection: Connection | None = None

    def run(self, work: Callable[[Connection], Result], *, autocommit: bool = False) -> Result:
        """Return what `work` returns, in a transaction, which is repeated if it did not succeed."""

        def attempt() -> Result:
            with self._translated():
                if self._connection is None:
                    self._connection = _connect(self._address)
                    self.on_connect(self._connection)
                if autocommit:  # building an index takes as long as it takes
                    return work(self._connection)
                with self._limited(self._connection), self._connection.transaction():
                    return work(self._connection)

        return retrying(attempt, self._patience_s, self._notify)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error):
                self._connection.close()
            self._connection = None

    def on_connect(self, connection: Connection) -> None:
        """Prepare a new connection."""

    @contextlib.contextmanager
    def _limited(self, connection: Connection) -> Iterator[None]:
        """Cut the connection after `limit_s`, as what waits for an answer cannot be interrupted."""
        is_late = threading.Event()

        def cut() -> None:
            is_late.set()
            with (
                contextlib.suppress(OSError, psycopg.Error),
                socket.socket(fileno=os.dup(connection.fileno())) as same,
            ):
                same.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.limit_s, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        except psycopg.Error:
            if is_late.is_set():
                raise Late(f"did not answer within {self.limit_s:.0f} s") from None
            raise
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as problem:
            error = _translated(problem, self._address)
            if isinstance(error, RemoteUnavailable):
                self.close()
            # The library's message, which may quote a URL, is not chained.
            raise error from None


class Late(psycopg.OperationalError):
    """The server did not answer in time."""


class Locked(psycopg.OperationalError):
    """Another connection holds the lock."""


def _connect(address: Address) -> Connection:
    """Return a connection, in autocommit mode so that each transaction is explicit."""
    options = psycopg.conninfo.conninfo_to_dict(address.url)
    defaults: dict[str, Any] = {
        "connect_timeout": _CONNECT_S,
        "application_name": "sbtk",
        "keepalives_idle": 30,
    }
    # A host that vanished is noticed while something is sent.
    defaults["tcp_user_timeout"] = 1000 * ANSWER_S
    # A pooler in between does not keep prepared statements.
    connection = psycopg.connect(**{**defaults, **options}, autocommit=True, prepare_threshold=None)
    connection.execute(f"SET lock_timeout = '{ANSWER_S}s'")
    with contextlib.suppress(psycopg.ProgrammingError):  # there is no pgvector yet
        register_vector(connection)
    return connection


def _translated(problem: psycopg.Error, address: Address) -> RemoteError:
    """Return what a failure of the server or the connection means, without secrets."""
    shown, state = address.shown, problem.sqlstate or ""
    text = address.masked(problem.diag.message_primary or str(problem))
    if isinstance(problem, Late):
        return RemoteUnavailable(f"{shown} {text}", "", "start the server, or correct --at")
    if isinstance(problem, Locked):
        return RemoteUnavailable(
            f"another push of these photos to {shown} is running",
            "one push at a time of a source, or of a shard of it",
            "wait until it ends, then run the same command again",
        )
    if state == "42P01":
        return RemoteError(
            f"there is no collection {address.collection!r} in {shown}",
            "one that 'sbtk push' has made",
            "sbtk push GALLERY --at URL",
        )
    if state in _OTHER_TABLES:
        return of_another_program(address, text)
    if state == "3F000":
        return RemoteError(
            f"{shown} refuses: {text}", "a schema for the tables", "CREATE SCHEMA public;"
        )
    if state in ("0A000", "58P01", "42704") and "vector" in text:
        return RemoteError(
            f"{shown} has no pgvector: {text}",
            "PostgreSQL with the extension pgvector",
            "install pgvector on the server, then type in this database: CREATE EXTENSION vector;",
        )
    if state == "42501":
        is_extension = "extension" in text
        grant = f"GRANT ALL ON {address.collection}, {address.collection}_info, "
        regions = f"{address.collection}_regions"
        grant += f"{address.collection}_parts{f', {regions}' if regions in text else ''} TO USER;"
        return RemoteError(
            f"{shown} refuses: {text}",
            "a user who may create the extension"
            if is_extension
            else "a user who may create tables and write to them ('sbtk query' only reads)",
            "as a superuser: CREATE EXTENSION vector;"
            if is_extension
            else f"as their owner: {grant}",
        )
    if state in ("53100", "53200"):
        what = "disk" if state == "53100" else "memory"
        return RemoteError(
            f"the {what} of {shown} is full: {text}",
            "",
            "make room there, then run the same command again: it resumes",
        )
    if state == "57014":
        return RemoteUnavailable(f"{shown} did not answer within {ANSWER_S} s: {text}")
    if state == "25006":
        return RemoteError(
            f"{shown} only reads: {text}",
            "the primary server, and a database or user whose default_transaction_read_only is off",
            "correct --at",
        )
    # While connecting, errors have no code.
    if state == "53300" or any(words in text for words in ("too many c", "connection slots")):
        return RemoteUnavailable(
            f"{shown} refuses: {text}",
            "",
            "try again later, or raise its max_connections, or the user's CONNECTION LIMIT",
        )
    if state in _PASSING or state.startswith("08") or (not state and _is_lost(problem, text)):
        return RemoteUnavailable(
            f"{shown} does not answer: {text}", "", "start the server, or correct --at"
        )
    for words, remedy in _TLS.items() if not state else ():
        if words in text:
            return RemoteError(f"no secure connection to {shown}: {text}", "", remedy)
    return RemoteError(f"{shown} refuses: {text}", "", _remedy(text))


def _is_lost(problem: psycopg.Error, text: str) -> bool:
    """Return whether a connection was lost or refused, and not the user."""
    is_refused = any(
        word in text
        for word in (
            "password",
            "authentication",
            "does not exist",
            "pg_hba",
            "SSL",
            "resolve",
            "certificate",
            "invalid",
        )
    )
    return isinstance(problem, psycopg.OperationalError | psycopg.InterfaceError) and not is_refused


def _remedy(text: str) -> str:
    if "invalid response" in text or "resolve" in text:
        return "correct the host and the port in --at"
    if "database" in text and "does not exist" in text:
        return "createdb NAME, or correct the name after the last / of --at"
    if "password" in text or "authentication" in text:
        return "set PGPASSWORD, or add the password to ~/.pgpass"
    if "invalid URI" in text:
        return "correct what follows the ? of --at"
    return ""
