"""`sbtk push` and `sbtk query --at` with a real PostgreSQL."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbtk_cli.main import main
from tests.postgres_server import PASSWORD, PLAIN_PASSWORD, PostgresServer
from tests.tiny_remote import POSTGRES, server_fixture

server = server_fixture(POSTGRES)


@pytest.fixture
def url(server: PostgresServer, gallery: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty database, without the password, which is in PGPASSWORD."""
    server.execute("DROP DATABASE IF EXISTS photos WITH (FORCE)")
    server.execute("CREATE DATABASE photos")
    monkeypatch.setenv("PGPASSWORD", PLAIN_PASSWORD)
    for name in ("SBTK_AT", "SBTK_GALLERY"):
        monkeypatch.delenv(name, raising=False)
    yield server.url("photos").replace(f":{PASSWORD}@", "@")


def answered(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    shown = capsys.readouterr()
    assert PLAIN_PASSWORD not in shown.out + shown.err
    assert PASSWORD not in shown.out + shown.err
    return shown.out, shown.err


QUERY = ["query", "sketch.png", "-k", "5", "--model", "tiny", "--json"]


def test_a_gallery_is_pushed_and_queried(
    url: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "--at", url, "--source", "nas"]) == 0
    shown = url.replace("/photos", "/photos?collection=sbtk")
    assert answered(capsys)[0].startswith(f"8 photos of nas at {shown} (8 pushed) in ")
    assert main(["push", "gallery.sbtk", "--at", url, "--source", "nas", "--json"]) == 0
    report = json.loads(answered(capsys)[0])
    assert (report["pushed"], report["unchanged"], report["at"]) == (0, 8, shown)
    assert main(QUERY) == 0
    local = [json.loads(line) for line in answered(capsys)[0].splitlines()]
    assert main([*QUERY, "--at", url, "--photos", "nas=photos"]) == 0
    out, err = answered(capsys)
    there = [json.loads(line) for line in out.splitlines()]
    assert [(hit["path"], hit["rank"]) for hit in there] == [
        (hit["path"], hit["rank"]) for hit in local
    ]
    assert [hit["score"] for hit in there] == pytest.approx([hit["score"] for hit in local])
    assert [set(hit) for hit in there] == [set(hit) for hit in local]
    assert "--photos" not in err
    assert main([*QUERY, "--at", url]) == 0
    out, err = answered(capsys)
    names = [json.loads(line)["path"] for line in out.splitlines()]
    assert names == [f"source:nas/{Path(hit['path']).name}" for hit in local]
    assert "5 of these 5 photos are not on this machine: --photos SOURCE=FOLDER" in err


def test_sources_that_stay_are_named(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "--at", url, "--source", "nas"]) == 0
    assert "other sources" not in answered(capsys)[1]
    assert main(["push", "--at", url, "--source", "archive"]) == 0
    assert "photos of other sources stay there: 8 of nas\n" in answered(capsys)[1]


def test_a_source_is_removed_only_if_that_is_confirmed(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nas", "archive"):
        assert main(["push", "--at", url, "--source", name]) == 0
    answered(capsys)
    shown = url.replace("/photos", "/photos?collection=sbtk")
    remove = ["push", "--remove-source", "nas", "--at", url]
    for words, text in (
        (remove, f"nothing removed yet: --yes removes 8 photos of nas from {shown}\n"),
        (["push", "--list-sources", "--at", url], "archive: 8 photos\nnas: 8 photos\n"),
        ([*remove, "--yes"], f"8 photos of nas removed from {shown}\n"),
    ):
        assert main(words) == 0
        assert answered(capsys)[0] == text
    assert main(["push", "--list-sources", "--at", url, "--json"]) == 0
    (line,) = answered(capsys)[0].splitlines()
    assert json.loads(line) == {
        "name": "archive",
        "photos": 8,
        "shards": [],
        "absent_shards": [],
    }
    for words, code, text in (
        ([*remove, "--yes"], 2, "has no source nas\n  expected: one of: archive\n"),
        (["push", "--at", url, "--yes"], 2, "--yes requires --remove-source"),
        (["push", "gallery.sbtk", *remove[1:]], 2, "leave out the gallery"),
        ([*remove, "--list-sources"], 2, "leave out the gallery"),
        (["push", "--at", url, "--remove-source", "", "--yes"], 2, "has no source ''"),
    ):
        assert main(words) == code, words
        assert text in answered(capsys)[1]


def test_the_collection_can_be_named_by_a_variable(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBTK_AT", url)
    assert main(["push", "--source", "nas"]) == 0
    answered(capsys)
    assert main(QUERY) == 0
    assert '"path": "source:nas/' in answered(capsys)[0]
    # What is on the command line counts.
    assert main([*QUERY, "--gallery", "gallery.sbtk"]) == 0
    assert '"path": "source:nas/' not in answered(capsys)[0]


def test_a_collection_gives_a_contact_sheet_and_paths(
    url: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "--at", url, "--source", "nas"]) == 0
    words = ["query", "sketch.png", "--model", "tiny", "--at", url, "--photos", "nas=photos"]
    assert main([*words, "--html", "hits.html"]) == 0
    assert "data:image/jpeg" in (workplace / "hits.html").read_text()
    answered(capsys)
    assert main([*words, "--paths0"]) == 0


@pytest.mark.slow
def test_usage_errors_are_refused(
    url: str, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    down = f"postgresql://admin:{PASSWORD}@127.0.0.1:1/photos"
    for words, code, text in (
        (["push"], 2, "Name the collection: --at postgresql://"),
        ([*QUERY, "--at", "mysql://db/photos"], 2, "unknown kind of database (mysql://)"),
        ([*QUERY, "--at", url], 1, "there is no collection 'sbtk'"),
        ([*QUERY, "--at", down], 1, "does not answer"),
        ([*QUERY, "--at", url, "--gallery", "gallery.sbtk"], 2, "cannot be combined"),
        ([*QUERY, "--photos", "nas=photos"], 2, "--photos requires --at"),
        ([*QUERY, "--at", url, "--photos", "photos"], 2, "--photos SOURCE=FOLDER"),
        ([*QUERY, "--at", url, "--photos", "nas=nowhere"], 2, "there is no folder nowhere"),
        (["push", "nothing.sbtk", "--at", url], 1, "there is no gallery nothing.sbtk"),
        ([*QUERY, "--at", url, "--photos", "nas="], 2, "--photos SOURCE=FOLDER"),
        (
            [*QUERY, "--at", url, "--photos", "nas=photos", "--photos", "nas=."],
            *(2, "--photos nas=. after another one for this source"),
        ),
        (["push", "--at", url, "--source", "a", "--source", "b"], 2, "NAME=FOLDER for each"),
        (["push", "--at", url, "--source", "a="], 2, "NAME=FOLDER for each"),
        (
            ["push", "--at", url, "--source", "a=photos", "--source", "b=photos"],
            *(2, "--source b=photos after another one for this folder"),
        ),
    ):
        assert main(words) == code, words
        assert text in answered(capsys)[1]
    assert main(["push", "--at", url, "--source", "nas"]) == 0
    answered(capsys)
    assert main([*QUERY, "--at", url, "--photos", "tape=photos"]) == 2
    assert "has no source tape" in answered(capsys)[1]
    assert main([*QUERY, "--at", url, "--rerank", "expand"]) == 2
    assert "--rerank expand of a collection" in answered(capsys)[1]


def test_a_collection_of_another_model_is_not_queried(
    url: str, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    from tests.tiny import tiny_bundle

    assert main(["push", "--at", url, "--source", "nas"]) == 0
    tiny_bundle(workplace / "bundles" / "other", seed=5, name="other")
    answered(capsys)
    assert main(["query", "sketch.png", "--model", "other", "--at", url]) == 1
    error = answered(capsys)[1]
    found, expected = error.split("expected: ")
    assert "the model other@" in found and "tiny@" not in found
    assert expected.startswith("tiny@")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_password_is_hidden_from_the_list_of_processes() -> None:
    address = f"postgresql://me:{PASSWORD}@db/photos?password=sec%20ret"
    code = (
        "import sys; from sbtk_cli.options import hide_in_command_line as hide; "
        "from sbtk_runtime.gallery.remote_address import Address; "
        "hide(sys.argv[1], Address.parse(sys.argv[1]).secrets); "
        "print(open('/proc/self/cmdline').read().replace(chr(0), ' ')); print(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, address, "last"], capture_output=True, text=True, check=True
    )
    listed, kept = done.stdout.splitlines()
    hidden = "*" * len(PASSWORD)
    assert f"postgresql://me:{hidden}@db/photos?password={'*' * 9} last" in listed
    assert kept == address
