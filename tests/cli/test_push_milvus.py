"""`sbtk push` and `sbtk query --at` with milvus-lite, which has Milvus' interface."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbtk_cli.main import main
from tests.milvus_server import LiteServer
from tests.tiny_remote import LITE, server_fixture

server = server_fixture(LITE)

QUERY = ["query", "sketch.png", "-k", "5", "--model", "tiny", "--json"]


@pytest.fixture
def url(server: LiteServer, gallery: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("SBTK_AT", "SBTK_GALLERY"):
        monkeypatch.delenv(name, raising=False)
    yield server.make_database("photos")
    server.drop_database("photos")


def test_a_gallery_is_pushed_and_queried(
    url: str,
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SBTK_TOKEN", "some:se-cret")  # which milvus-lite does not ask for
    assert main(["push", "--at", url, "--source", "nas"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"8 photos of nas at {url}?collection=sbtk (8 pushed) in ")
    assert "se-cret" not in shown.err
    assert main(["push", "gallery.sbtk", "--at", url, "--source", "nas", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pushed"], report["unchanged"], report["deleted"]) == (0, 8, 0)
    for words in ([], ["--from", "2020-01-01"], ["--to", "2020-01-01"]):
        assert main([*QUERY, *words]) == 0
        local = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert main([*QUERY, *words, "--at", url, "--photos", "nas=photos"]) == 0
        there = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [set(hit) for hit in there] == [set(hit) for hit in local]
        assert [hit["path"] for hit in there] == [hit["path"] for hit in local]
        assert [hit["score"] for hit in there] == pytest.approx([hit["score"] for hit in local])


@pytest.mark.slow
def test_usage_errors_are_refused(
    url: str, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    for at, code, text in (
        (url, 1, "there is no collection 'sbtk'"),
        ("milvus://root:se-cret@127.0.0.1:1", 1, "does not answer"),
        ("https://se-cret@127.0.0.1:1/photos", 1, "does not answer"),
        ("milvus://root:se-cret@", 2, "names no host"),
        ("milvus://host:1/a/b", 2, "no name of a database"),
        ("https://host?token=se-cret", 2, "parameters that Milvus does not take (token)"),
    ):
        assert main([*QUERY, "--at", at]) == code, at
        shown = capsys.readouterr().err
        assert text in shown and "se-cret" not in shown
        # One sentence, and none of the library's tracebacks.
        assert "Traceback" not in shown and len(shown.splitlines()) < 6


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_token_is_hidden_from_the_list_of_processes() -> None:
    code = (
        "import sys; from sbtk_cli.options import hide_in_command_line as hide; "
        "from sbtk_runtime.gallery.remote_address import Address; "
        "hide(sys.argv[1], Address.parse(sys.argv[1]).secrets); "
        "print(open('/proc/self/cmdline').read())"
    )
    for address in ("https://key-%41@db:19530/photos", "milvus://root:key-%41@db"):
        done = subprocess.run(
            [sys.executable, "-c", code, address], capture_output=True, text=True, check=True
        )
        assert "key-" not in done.stdout and "@db" in done.stdout
