"""Addresses of collections in databases, as they are used and as they are shown."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import (
    SplitResult,
    parse_qsl,
    quote,
    unquote,
    unquote_to_bytes,
    urlencode,
    urlsplit,
    urlunsplit,
)

from sbtk_runtime.errors import BadConfig

_SCHEMES = {
    "postgresql": "postgres",
    "postgres": "postgres",
    "milvus": "milvus",
    "http": "milvus",
    "https": "milvus",
}
_COLLECTION = re.compile(r"[a-z][a-z0-9_]{0,39}")
_MILVUS_DATABASE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_TOKEN = "SBTK_TOKEN"  # noqa: S105


@dataclass(frozen=True)
class Address:
    """Where a collection is.

    Attributes:
        url: as the client library takes it; for PostgreSQL with the password.
        kind: `postgres` or `milvus`.
        collection: its name there.
        shown: for messages, without the password.
        secrets: texts that no message may contain.
        database: its name, for Milvus; empty for the default one.
        token: `USER:PASSWORD` or an API key, for Milvus; empty for none.
    """

    url: str
    kind: str
    collection: str
    shown: str
    secrets: tuple[str, ...] = ()
    database: str = ""
    token: str = ""

    @classmethod
    def parse(cls, url: str) -> Address:
        """Return the address of a URL such as `postgresql://user@host/database?collection=name`.

        A token of Milvus that is not in the URL is taken from SBTK_TOKEN.

        Raises:
            BadConfig: it is none. The message does not repeat what may be a password.
        """
        what = "the URL of --at cannot be read"
        try:
            unquote_to_bytes(url).decode()  # raises for what is not UTF-8
            parts = urlsplit(url)
            what += ": its port is not a number of at most 65,535"
            for host in _hosts(parts).split(","):  # libpq takes several
                _ = urlsplit(f"//{host}").port  # raises for what is no such number
        except ValueError as problem:
            raise _bad_url(what) from problem
        if parts.scheme not in _SCHEMES:
            shown = f"{parts.scheme}://" if parts.scheme and "://" in url else "no scheme"
            raise _bad_url(f"--at names an unknown kind of database ({shown})")
        # To libpq, a + is not a space.
        options = parse_qsl(parts.query.replace("+", "%2B"), keep_blank_values=True)
        names = [value for name, value in options if name == "collection"] or ["sbtk"]
        if len(names) > 1 or not _COLLECTION.fullmatch(names[0]):
            raise BadConfig(
                f"a collection cannot be called {names[-1]!r}",
                "a lower-case letter, then at most 39 lower-case letters, digits and _",
            )
        kept = [(name, value) for name, value in options if name != "collection"]
        kind = _SCHEMES[parts.scheme]
        # What follows a / or # that is not escaped may belong to a password.
        is_cut = bool(parts.fragment) or "@" in parts.path
        if kind == "milvus":
            return _milvus(parts, kept, names[0], is_cut=is_cut)
        if is_cut or not parts.path.strip("/") or "://" not in url:
            raise _bad_url("--at names no database")
        pairs = [pair.partition("=") for pair in parts.query.split("&")]
        secrets = [value for name, _, value in pairs if "password" in name]  # as written
        secrets += [value for name, value in kept if "password" in name]
        secrets += [parts.password] if parts.password else []
        shown_options = [(name, value) for name, value in kept if "password" not in name]
        return cls(
            url=_joined(parts, parts.username, parts.password, kept),
            kind=kind,
            collection=names[0],
            shown=_joined(parts, parts.username, None, [*shown_options, ("collection", names[0])]),
            secrets=_both_ways(secrets),
        )

    def masked(self, text: str) -> str:
        """Return a message of a database without secrets, in one line."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return " ".join(text.split())


def _milvus(
    parts: SplitResult, options: list[tuple[str, str]], collection: str, *, is_cut: bool
) -> Address:
    database = parts.path.strip("/")
    is_cut |= "," in _hosts(parts)
    if is_cut or not parts.hostname or (database and not _MILVUS_DATABASE.fullmatch(database)):
        raise _bad_url("--at names no host, or no name of a database of Milvus")
    if options:  # whose values may be secret
        names = ", ".join(sorted({name for name, _ in options}))
        raise _bad_url(f"--at has parameters that Milvus does not take ({names[:60]})")
    user, password = parts.username or "", parts.password or ""
    variable = os.environ.get(_TOKEN, "")
    token = ":".join(map(unquote, filter(None, (user, password))))
    secrets = [password, token]
    shown_user: str | None = user if password else None
    if user and not password:
        # Without a password in SBTK_TOKEN it is an API key.
        secrets.append(user)
        token = f"{unquote(user)}:{variable}" if variable else token
    elif not user:
        token = variable
    if variable:
        secrets += [variable, variable.partition(":")[2]]
    scheme = "https" if parts.scheme == "https" else "http"
    return Address(
        url=urlunsplit((scheme, _hosts(parts), "", "", "")),
        kind="milvus",
        collection=collection,
        shown=_joined(parts, shown_user, None, [("collection", collection)]),
        secrets=_both_ways([*secrets, token]),
        database=database,
        token=token,
    )


def _both_ways(secrets: list[str]) -> tuple[str, ...]:
    """Return secrets as they are written in URLs and as they are."""
    plain = set(map(unquote, secrets))
    return tuple({*secrets, *plain, *(quote(one, safe="") for one in plain)} - {""})


def _quoted(text: str) -> str:
    """Return a part of a URL with all special characters as %XX, whether or not they were."""
    return quote(unquote(text), safe="")


def _hosts(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _joined(
    parts: SplitResult, user: str | None, password: str | None, options: list[tuple[str, str]]
) -> str:
    """Return a URL; one without a host keeps its //, which libpq needs."""
    names = ":".join(_quoted(name) for name in (user or "", password) if name is not None)
    query = urlencode(options, quote_via=quote)
    return (
        f"{parts.scheme}://{names}{'@' if names else ''}{_hosts(parts)}{parts.path}"
        f"{'?' if query else ''}{query}"
    )


def _bad_url(found: str) -> BadConfig:
    return BadConfig(
        found,
        "postgresql://USER@HOST/DATABASE or milvus://HOST:PORT, or https:// for Milvus with TLS "
        "(special characters of a password as %XX)",
        f"leave the password out of the URL: set PGPASSWORD, or {_TOKEN} for Milvus",
    )
