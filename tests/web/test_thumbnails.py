"""Thumbnails are made once, kept within bounds, and refused where there is no picture."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from sbtk_runtime.web.photo_files import PhotoGone
from sbtk_runtime.web.thumbnails import SizePx, Thumbnails
from tests.tiny import tiny_photo


def photo(folder: Path, seed: int) -> Path:
    path = folder / f"{seed}.png"
    tiny_photo(seed).save(path)
    return path


def made(thumbnails: Thumbnails, path: Path, tag: str) -> bytes:
    with path.open("rb") as file:
        return thumbnails.jpeg(file, tag, SizePx.SMALL)


def test_what_is_kept_is_not_made_again(tmp_path: Path) -> None:
    thumbnails = Thumbnails()
    first = made(thumbnails, photo(tmp_path, 1), "one")
    assert Image.open(io.BytesIO(first)).format == "JPEG"
    # The tag stands for the file's content, so another file shows which of them was read.
    assert made(thumbnails, photo(tmp_path, 2), "one") is first
    assert made(thumbnails, photo(tmp_path, 2), "two") != first


def test_the_memory_has_a_bound_and_what_was_asked_for_last_stays(tmp_path: Path) -> None:
    paths = [photo(tmp_path, seed) for seed in range(6)]
    sizes = [len(made(Thumbnails(), path, "")) for path in paths]
    limit = max(sizes) * 3
    thumbnails = Thumbnails(limit)
    first = made(thumbnails, paths[0], "0")
    for number, path in enumerate(paths):
        made(thumbnails, path, f"{number}")
        assert made(thumbnails, paths[0], "0") is first
        assert 0 < thumbnails.kept_bytes <= limit
    dropped = made(thumbnails, paths[0], "1")
    assert dropped == first, "the second one was dropped, so it is made of what is given now"


def test_a_thumbnail_over_the_bound_is_made_and_not_kept(tmp_path: Path) -> None:
    thumbnails = Thumbnails(10)
    assert len(made(thumbnails, photo(tmp_path, 1), "one")) > 10
    assert thumbnails.kept_bytes == 0


@pytest.mark.parametrize("content", [b"", b"<svg/>", b"\xff\xd8\xff\xe0 cut short"])
def test_what_is_no_picture_any_more_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(PhotoGone, match="cannot be shown"):
        made(Thumbnails(), path, "one")
