"""Addresses hide passwords, paths survive as text, and databases may be down for a while."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.gallery.push import source_names
from sbtk_runtime.gallery.remote import (
    Place,
    RemoteError,
    RemotePhoto,
    RemoteUnavailable,
    escape_path,
    photo_id,
    retrying,
    unescape_path,
)
from sbtk_runtime.gallery.remote_address import Address


def test_an_address_is_parsed() -> None:
    address = Address.parse("postgresql://me:se%40cret@db.example:5433/photos?collection=archive")
    assert address.url == "postgresql://me:se%40cret@db.example:5433/photos"
    assert (address.kind, address.collection) == ("postgres", "archive")
    assert address.shown == "postgresql://me@db.example:5433/photos?collection=archive"
    assert Address.parse("postgres://db/photos?sslmode=require").collection == "sbtk"


def test_an_address_of_milvus_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBTK_TOKEN", raising=False)
    address = Address.parse("milvus://root:se%40cret@db:19530/photos?collection=archive")
    assert (address.kind, address.url) == ("milvus", "http://db:19530")
    assert (address.database, address.collection) == ("photos", "archive")
    assert address.token == "root:se@cret"
    assert address.shown == "milvus://root@db:19530/photos?collection=archive"
    key = Address.parse("https://db-%4110@db.example/")
    assert (key.url, key.token, key.database) == ("https://db.example", "db-A10", "")
    assert "db-%4110" not in key.shown and "***" in key.masked("token db-A10")
    assert Address.parse("http://[::1]:19530").url == "http://[::1]:19530"
    monkeypatch.setenv("SBTK_TOKEN", "root:hunter2")
    assert Address.parse("milvus://db").token == "root:hunter2"
    assert "hunter2" not in Address.parse("milvus://db").masked("root:hunter2 hunter2")
    assert Address.parse("milvus://me:own@db").token == "me:own"
    monkeypatch.setenv("SBTK_TOKEN", "hunter2")
    assert Address.parse("milvus://me@db").token == "me:hunter2"
    # PostgreSQL is not told.
    assert Address.parse("postgresql://db/photos").token == ""


def test_libpq_gets_a_url_as_it_reads_it() -> None:
    # On this machine, through a socket.
    assert Address.parse("postgresql:///photos").url == "postgresql:///photos"
    assert Address.parse("postgresql:///p?host=%2Frun").url == "postgresql:///p?host=%2Frun"
    several = Address.parse("postgresql://me@one:5433,[::1]:5434/photos?collection=archive")
    assert several.url == "postgresql://me@one:5433,[::1]:5434/photos"
    assert several.shown == "postgresql://me@one:5433,[::1]:5434/photos?collection=archive"
    assert Address.parse("postgresql://db/photos?password=a+b%2B").url.endswith("=a%2Bb%2B")
    # What libpq would take for the host, or refuse with a message that has a part of a password.
    for written, quoted in (
        ("a@b", "a%40b"),
        ("a b", "a%20b"),
        ("a%b", "a%25b"),
        ("%C3%A9", "%C3%A9"),
    ):
        address = Address.parse(f"postgresql://me:{written}@db/photos")
        assert address.url == f"postgresql://me:{quoted}@db/photos"
        assert "***" in address.masked(f"x {quoted}") and "***" in address.masked(f"x {written}")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:se%40cret@db/photos",
        "postgresql://me:se%2Fcr%3Aet%23@db/photos?password=other%20one&sslpassword=third",
        "postgresql://db/photos?user=me&password=hunter2",
    ],
)
def test_messages_contain_no_password(url: str) -> None:
    address = Address.parse(url)
    secrets = ["se%40cret", "se@cret", "se%2Fcr%3Aet%23", "se/cr:et#", "hunter2", "other one"]
    text = address.masked(f"cannot open {address.url} with {' '.join(address.secrets)}")
    for secret in secrets:
        assert secret not in address.shown + text


@pytest.mark.parametrize(
    "url",
    [
        *("", "photos", "/srv/photos", "ftp://me:se-cret@db/photos", "postgresql:", "://x"),
        *("postgresql:photos", "postgresql:/photos", "postgresql://me:se-cret%FF@db/photos"),
        *("postgresql://me:se-cret\udce9@db/photos", "postgresql://me@a:1,b:se-cret/photos"),
        *("postgresql://me:se-cret@db", "postgresql://me:se-cret@db/", "mysql://db/photos"),
        *("postgresql://me:se-cret/x@db/photos", "postgresql://me:1/se-cret@db:port/photos"),
        *("postgresql://me:se-cret#x@db/photos", "postgresql://[me:se-cret@db/photos"),
        *("postgresql://db/photos?collection=", "postgresql://db/photos?collection=A"),
        *(
            "postgresql://db/photos?collection=a;drop",
            "postgresql://db/p?collection=a&collection=b",
        ),
        f"postgresql://db/photos?collection={'a' * 41}",
        *("milvus://", "milvus://me:se-cret@", "milvus://db/a/b", "milvus://db/a-b", "http:///x"),
        *("https://me:se-cret/x@db", "https://me:se-cret#x@db", "https://db?token=se-cret"),
        "milvus://one:1,two:2",
    ],
)
def test_wrong_urls_are_refused_without_repeating_passwords(url: str) -> None:
    with pytest.raises(BadConfig) as caught:
        Address.parse(url)
    assert "se-cret" not in str(caught.value)


@given(st.binary(max_size=300).filter(lambda path: b"\0" not in path))
def test_every_path_survives_escaping(path: bytes) -> None:
    text = escape_path(path)
    assert unescape_path(text) == path
    text.encode("utf-8")


@given(st.binary(min_size=1, max_size=30), st.binary(min_size=1, max_size=30))
def test_escaping_preserves_which_folder_a_path_is_in(folder: bytes, name: bytes) -> None:
    folder, name = folder.replace(b"/", b"_"), name.replace(b"/", b"_")
    interval = Place("s", folder).interval()
    assert interval is not None
    low, high = (text.encode() for text in interval)
    assert low <= escape_path(folder + b"/" + name).encode() < high
    assert not low <= escape_path(folder + name).encode() < high
    assert not low <= escape_path(folder).encode() < high


def test_escaped_paths_are_readable() -> None:
    assert escape_path("Zürich/été.jpg".encode()) == "Zürich/été.jpg"
    assert escape_path(b"caf\xe9/a\\b.jpg") == "caf\\xe9/a\\\\b.jpg"


def test_ids_never_change() -> None:
    # Collections depend on it: printf 'nas\0a.jpg' | sha256sum | head -c16, halved.
    assert photo_id("nas", b"a.jpg") == 1925075729765673487
    assert 0 < photo_id("", b"") < 1 << 63


def test_a_stamp_changes_with_every_stored_value() -> None:
    values = {"size_bytes": 3, "mtime_ns": 4, "sha256": "ab" * 32, "partial": None}
    photo = RemotePhoto(id=1, source="s", path="a.jpg", **values)  # type: ignore[arg-type]
    others = [
        RemotePhoto(**{**photo.__dict__, name: value})
        for name, value in (
            *(("path", "b.jpg"), ("size_bytes", 4), ("mtime_ns", 5)),
            *(("sha256", "ac" * 32), ("partial", "half")),
        )
    ]
    assert len({one.stamp for one in [photo, *others]}) == 6
    assert all(0 <= one.stamp < 1 << 63 for one in others)


def test_sources_are_named_after_host_and_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "nas")
    roots = [b"/srv/photos", b"/srv/photos/2019", b"/home/me/caf\xe9"]
    assert source_names(roots) == {
        b"/home/me/caf\xe9": "nas:/home/me/caf\\xe9",
        b"/srv/photos": "nas:/srv/photos",
    }
    assert source_names([]) == {b"/": "nas:/"}
    assert source_names([b"/a", b"/a/b"], "mine") == {b"/a": "mine"}
    assert source_names([b"/a", b"/b"], {"/a": "one"}) == {b"/a": "one", b"/b": "nas:/b"}


@pytest.mark.parametrize(
    ("roots", "names", "message"),
    [
        ([b"/a", b"/b"], "one", "2 folders"),
        ([b"/%d" % i for i in range(9)], "one", r"9 folders \(/0, /1, /2, /3, /4, and 4 more\)"),
        ([b"/a"], {"/c": "one"}, "no folder /c"),
        ([b"/a", b"/b"], {"/a": "x", "/b": "x"}, "have one name"),
        ([b"/a"], "", "cannot be called ''"),
        ([b"/a"], "a\nb", "cannot be called"),
        ([b"/a"], "a=b", "cannot be called"),
        ([b"/" + b"a" * 300], None, "--source NAME"),
    ],
)
def test_invalid_names_are_refused(
    roots: list[bytes], names: str | dict[str, str] | None, message: str
) -> None:
    with pytest.raises(BadConfig, match=message):
        source_names(roots, names)


def test_a_database_that_recovers_is_retried() -> None:
    calls: list[int] = []

    def ask() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise RemoteUnavailable("it starts")
        return "answer"

    said: list[str] = []
    assert retrying(ask, 30, said.append) == "answer"
    assert said == ["it starts: trying again for 30 s"]  # once
    with pytest.raises(RemoteUnavailable, match="it starts"):
        calls.clear()
        retrying(ask, 0)
    assert len(calls) == 1


def test_other_errors_are_raised_at_once() -> None:
    def ask() -> None:
        raise RemoteError("no")

    with pytest.raises(RemoteError, match="no"):
        retrying(ask, 1000)


def test_a_filter_by_source_alone_has_no_interval() -> None:
    assert Place("s").interval() is None
