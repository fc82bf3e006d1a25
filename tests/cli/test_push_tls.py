"""`sbtk push` and `sbtk query --at` over TLS."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbtk_cli.main import main
from tests.postgres_server import DEBIANS, PASSWORD, PLAIN_PASSWORD, PostgresServer, TlsServer
from tests.tiny_remote import POSTGRES, server_fixture
from tests.tls import NEEDS_OPENSSL, Certificate, tls_in_front

pytestmark = NEEDS_OPENSSL

server = server_fixture(POSTGRES)
QUERY = ["query", "sketch.png", "-k", "5", "--model", "tiny", "--json"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.make(tmp_path_factory.mktemp("tls") / "certificate")


@pytest.fixture(scope="module")
def url(server: PostgresServer, certificate: Certificate) -> Iterator[str]:
    """The URL of an empty database, where the server has TLS."""
    plain = server.make_database("photos")
    with tls_in_front(server.port, certificate) as port:
        yield plain.replace(f":{server.port}/", f":{port}/")


def test_a_gallery_is_pushed_and_queried_over_tls(
    url: str, gallery: Path, certificate: Certificate, capsys: pytest.CaptureFixture[str]
) -> None:
    safe = f"{url}?sslmode=verify-full&sslrootcert={certificate.authority}"
    assert main(["push", "--at", safe, "--source", "nas"]) == 0
    capsys.readouterr()
    assert main(QUERY) == 0
    local = [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]
    assert main([*QUERY, "--at", safe, "--photos", "nas=photos"]) == 0
    there = [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]
    assert there == local
    assert main([*QUERY, "--at", f"{url}?sslmode=require"]) == 0  # trusts any authority


def test_connections_without_the_tls_that_the_url_demands_are_refused(
    url: str,
    server: PostgresServer,
    gallery: Path,
    certificate: Certificate,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = Certificate.make(gallery.parent / "other").authority
    mode = "?sslmode=verify-full&sslrootcert="
    elsewhere = url.replace("127.0.0.1", "elsewhere.invalid") + mode + str(certificate.authority)
    for at, text, remedy in (
        (f"{url}{mode}{other}", "certificate verify failed", "?sslrootcert=FILE"),
        (f"{url}{mode}{gallery.parent / 'nothing.pem'}", "does not exist", "?sslrootcert=FILE"),
        (f"{elsewhere}&hostaddr=127.0.0.1", "does not match host name", "name the host"),
        (server.url("photos", sslmode="require"), "server does not support SSL", "turn ssl on"),
    ):
        for command in (["push", "gallery.sbtk", "--source", "nas"], QUERY):
            assert main([*command, "--at", at]) == 1, at
            shown = capsys.readouterr().err
            assert shown.startswith("Error: no secure connection to postgresql://admin@"), shown
            assert text in shown and remedy in shown
            assert "Traceback" not in shown and len(shown.splitlines()) < 6
            assert PASSWORD not in shown and PLAIN_PASSWORD not in shown


@pytest.mark.skipif(DEBIANS is None, reason="Debian's PostgreSQL, which has TLS, is not installed")
def test_a_server_of_debian_is_reached_over_its_own_tls(
    gallery: Path, certificate: Certificate, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Certificate.make(gallery.parent / "other").authority
    server = TlsServer(certificate)
    mode = {"sslmode": "verify-full"}
    push = ["push", "gallery.sbtk", "--source", "nas"]
    try:
        for command, authority, text in (
            (push, other, "certificate verify failed"),
            (push, certificate.authority, "has no pgvector"),
            (QUERY, certificate.authority, "there is no collection 'sbtk'"),
        ):
            at = server.url(**mode, sslrootcert=str(authority))
            assert main([*command, "--at", at]) == 1
            assert text in capsys.readouterr().err
        pg_hba = server.place / "home" / "data" / "pg_hba.conf"
        pg_hba.write_text("hostssl all all 127.0.0.1/32 scram-sha-256")
        server.execute("SELECT pg_reload_conf()")
        assert main([*QUERY, "--at", server.url(sslmode="disable")]) == 1
        shown = capsys.readouterr().err
        assert "no encryption" in shown and "next: write ?sslmode=require in --at" in shown
    finally:
        server.close()
