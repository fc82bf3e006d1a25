"""`sbtk embed` as users type it: the file's format, lists of paths, and what is skipped."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sbtk_cli.main import main
from tests.tiny import tiny_photo

EMBED = ["embed", "--model", "tiny", "--threads", "1", "-o", "out.npz"]


def test_the_file_holds_paths_as_given_and_unit_rows(workplace: Path) -> None:
    given = ["photos/photo-0003.png", "./photos/photo-0000.jpg", "photos/photo-0003.png"]
    assert main([*EMBED, "--as", "photo", *given]) == 0
    with np.load(workplace / "out.npz", allow_pickle=False) as file:
        assert set(file.files) == {"paths", "embeddings"}
        paths, embeddings = file["paths"], file["embeddings"]
    assert paths.dtype.kind == "U"
    assert paths.tolist() == given
    assert embeddings.shape == (3, 16)
    assert embeddings.dtype == np.float32
    assert np.abs(np.linalg.norm(embeddings, axis=1) - 1).max() < 1e-3
    assert np.array_equal(embeddings[0], embeddings[2])


def test_sketches_are_prepared_as_sketches(workplace: Path) -> None:
    rows = {}
    for kind in ("sketch", "photo"):
        assert main([*EMBED, "--as", kind, "sketch.png"]) == 0
        rows[kind] = np.load("out.npz")["embeddings"][0]
    assert not np.allclose(rows["sketch"], rows["photo"])


def test_unreadable_files_are_left_out_and_named(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "bad.jpg").write_bytes(b"no image")
    files = ["bad.jpg", "photos/photo-0001.png", "absent.jpg"]
    assert main([*EMBED, "--as", "photo", *files, "--json"]) == 3
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert summary["embedded"] == 1
    assert [failure["path"] for failure in summary["failed"]] == ["bad.jpg", "absent.jpg"]
    assert "absent.jpg: cannot be read: No such file" in shown.err
    assert np.load("out.npz")["paths"].tolist() == ["photos/photo-0001.png"]


def test_partly_readable_files_are_named(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_photo(31).resize((320, 240)).save(workplace / "cut.jpg")
    whole = (workplace / "cut.jpg").read_bytes()
    (workplace / "cut.jpg").write_bytes(whole[: len(whole) * 97 // 100])
    assert main([*EMBED, "--as", "photo", "photos/photo-0001.png", "cut.jpg", "--json"]) == 0
    shown = capsys.readouterr()
    (notice,) = json.loads(shown.out)["notices"]
    assert notice["path"] == "cut.jpg"
    assert notice["notice"].startswith("partly readable: 9")
    assert f"cut.jpg: {notice['notice']}" in shown.err


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
def test_paths_can_come_from_a_list_file(workplace: Path, separator: bytes) -> None:
    names = [b"photos/photo-0001.png", b"photos/photo-0002.jpg"]
    (workplace / "list.txt").write_bytes(separator.join([*names, b""]))
    assert main([*EMBED, "--as", "photo", "sketch.png", "--from-file", "list.txt"]) == 0
    paths = np.load("out.npz")["paths"].tolist()
    assert paths == ["sketch.png", *map(os.fsdecode, names)]


def test_a_list_from_a_pipe_may_contain_any_bytes(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = b"photos/not \xff\nutf-8.png"
    (workplace / "photos" / "photo-0001.png").rename(os.fsdecode(name))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(name + b"\0")))
    assert main([*EMBED, "--as", "photo", "--from-file", "-"]) == 0
    assert np.load("out.npz")["paths"].tolist() == [os.fsdecode(name)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*EMBED, "--as", "photo"], 2, "--from-file"),
        ([*EMBED, "sketch.png"], 2, "--as"),
        (["embed", "sketch.png", "--as", "sketch"], 2, "--output"),
        ([*EMBED, "--as", "photo", "photos"], 1, "0 of 1 file could be read"),
        ([*EMBED, "--as", "photo", "--from-file", "empty.txt"], 1, "the list is empty"),
        ([*EMBED, "--as", "photo", "--from-file", "absent.txt"], 1, "absent.txt: No such file"),
        (["embed", "sketch.png", "--as", "sketch", "-o", "no/out.npz"], 2, "no/out.npz"),
    ],
)
def test_errors_say_what_cannot_be_done(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (workplace / "empty.txt").touch()
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not (workplace / "out.npz").exists()
