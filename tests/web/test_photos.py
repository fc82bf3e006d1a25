"""Only photos that are still where they were indexed are opened, whatever replaced them."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbtk_runtime.web.photos import (
    PhotoNotFound,
    SizePx,
    Thumbnails,
    etag_of,
    media_type_of,
    open_photo,
)
from sbtk_runtime.web.queue import Busy
from tests.tiny import tiny_photo
from tests.tiny_raw import tiny_dng, two_colours

SECRET = b"what nobody may read"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with `album/photo.png`, beside a secret."""
    (tmp_path / "photos" / "album").mkdir(parents=True)
    tiny_photo(1).save(tmp_path / "photos" / "album" / "photo.png")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "photo.png").write_bytes(SECRET)
    return tmp_path / "photos"


def opened(path: Path, *roots: Path) -> bytes:
    with open_photo(os.fsencode(path), [os.fsencode(root) for root in roots]) as file:
        return file.read()


def test_a_photo_below_its_root_is_opened(root: Path) -> None:
    photo = root / "album" / "photo.png"
    content = photo.read_bytes()
    assert opened(photo, root) == content
    assert opened(photo, root / "album") == content
    assert opened(photo, root.parent / "elsewhere", root) == content
    assert opened(photo, Path("/")) == content
    assert opened(photo, photo) == content


def test_a_root_may_be_a_link(root: Path) -> None:
    linked = root.parent / "linked"
    linked.symlink_to(root)
    photo = linked / "album" / "photo.png"
    assert opened(photo, linked) == photo.read_bytes()
    with pytest.raises(PhotoNotFound):
        opened(photo, root.parent)


def test_without_known_roots_no_part_of_a_path_may_be_a_link(root: Path) -> None:
    linked = root.parent / "linked"
    linked.symlink_to(root)
    assert opened(root / "album" / "photo.png") == (root / "album" / "photo.png").read_bytes()
    with pytest.raises(PhotoNotFound):
        opened(linked / "album" / "photo.png")


def replaced_by_a_link(photo: Path) -> None:
    photo.unlink()
    photo.symlink_to(photo.parents[2] / "secret" / "photo.png")


def replaced_by_a_link_inside_the_root(photo: Path) -> None:
    tiny_photo(2).save(photo.with_name("other.png"))
    photo.unlink()
    photo.symlink_to("other.png")


def folder_replaced_by_a_link(photo: Path) -> None:
    photo.unlink()
    photo.parent.rmdir()
    photo.parent.symlink_to(photo.parents[2] / "secret")


def removed(photo: Path) -> None:
    photo.unlink()


def replaced_by_a_folder(photo: Path) -> None:
    photo.unlink()
    photo.mkdir()


def replaced_by_a_pipe(photo: Path) -> None:
    photo.unlink()
    os.mkfifo(photo)


def replaced_by_a_socket(photo: Path) -> None:
    photo.unlink()
    # The paths of sockets are short.
    with contextlib.chdir(photo.parent), socket.socket(socket.AF_UNIX) as end:
        end.bind(photo.name)


@pytest.mark.parametrize(
    "change",
    [
        replaced_by_a_link,
        replaced_by_a_link_inside_the_root,
        folder_replaced_by_a_link,
        removed,
        replaced_by_a_folder,
        replaced_by_a_pipe,
        replaced_by_a_socket,
    ],
)
def test_a_file_that_replaced_a_photo_is_not_opened(
    root: Path, change: Callable[[Path], None]
) -> None:
    photo = root / "album" / "photo.png"
    assert opened(photo, root)
    change(photo)
    with pytest.raises(PhotoNotFound, match="no longer there"):
        opened(photo, root)
    with pytest.raises(PhotoNotFound):
        opened(photo)


@pytest.mark.parametrize(
    "path",
    [
        "{root}/../secret/photo.png",
        "{root}/album/../../secret/photo.png",
        "{root}/./album/photo.png",
        "{root}//album/photo.png",
        "{root}/album/photo.png/",
        "{root}x/photo.png",
        "{root}",
        "album/photo.png",
        "",
        "{root}/album/photo.png\0",
    ],
)
def test_paths_that_indexing_never_stores_are_not_opened(root: Path, path: str) -> None:
    with pytest.raises(PhotoNotFound):
        open_photo(os.fsencode(path.format(root=root)), [os.fsencode(root)])


def test_a_photo_outside_of_every_root_is_not_opened(root: Path) -> None:
    secret = root.parent / "secret" / "photo.png"
    assert secret.is_file()
    with pytest.raises(PhotoNotFound):
        opened(secret, root, root / "album" / "photo.png")


@pytest.mark.parametrize(
    ("form", "media_type"),
    [
        ("JPEG", "image/jpeg"),
        ("PNG", "image/png"),
        ("WEBP", "image/webp"),
        ("GIF", "image/gif"),
        ("BMP", "image/bmp"),
        ("TIFF", "image/tiff"),
        ("PPM", "image/x-portable-anymap"),
    ],
)
def test_the_media_type_is_detected_from_the_bytes(form: str, media_type: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 200), (9, 200, 90)).save(file, form)
    file.seek(0)
    assert media_type_of(file) == media_type
    assert file.tell() == 0


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_media_type_is_detected_despite_much_metadata(form: str) -> None:
    file = io.BytesIO()
    # As printers' colour profiles are; random, since PNG compresses it.
    profile = np.random.default_rng(0).bytes(600_000)
    Image.new("RGB", (300, 200), (9, 200, 90)).save(file, form, icc_profile=profile)
    assert len(file.getvalue()) > 600_000
    file.seek(0)
    assert media_type_of(file) == f"image/{form.lower()}"


def test_having_too_many_open_files_is_not_reported_as_a_missing_photo(root: Path) -> None:
    photo = root / "album" / "photo.png"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(Busy):
            open_photo(os.fsencode(photo), [os.fsencode(root)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert opened(photo, root) == photo.read_bytes()


def test_media_types_of_formats_without_a_leading_header_are_detected() -> None:
    assert media_type_of(io.BytesIO(b"\0\0\0\x18ftypheic\0\0\0\0")) == "image/heic"
    assert media_type_of(io.BytesIO(b"II*\0\xff\xff\xff\x0f" + bytes(100))) == "image/tiff"
    brands = b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf"
    assert media_type_of(io.BytesIO(brands)) == "image/avif"
    for preview in (None, two_colours((480, 320))):
        assert media_type_of(io.BytesIO(tiny_dng(preview))) == "image/x-raw"


@pytest.mark.parametrize("content", [b"", b"<svg/>", b"%PDF-1.7"])
def test_other_files_have_no_media_type(content: bytes) -> None:
    with pytest.raises(PhotoNotFound, match="no longer an image"):
        media_type_of(io.BytesIO(content))


def test_etags_change_with_the_file_and_the_size(root: Path) -> None:
    photo = root / "album" / "photo.png"

    def tag(purpose: str) -> str:
        with open_photo(os.fsencode(photo), [os.fsencode(root)]) as file:
            return etag_of(file, purpose)

    first = tag("360")
    assert tag("360") == first
    assert tag("180") != first
    os.utime(photo, ns=(0, photo.stat().st_mtime_ns + 1))
    assert tag("360") != first


def photo(folder: Path, seed: int) -> Path:
    path = folder / f"{seed}.png"
    tiny_photo(seed).save(path)
    return path


def made(thumbnails: Thumbnails, path: Path, tag: str) -> bytes:
    with path.open("rb") as file:
        return thumbnails.jpeg(file, tag, SizePx.SMALL)


def test_cached_thumbnails_are_not_made_again(tmp_path: Path) -> None:
    thumbnails = Thumbnails()
    first = made(thumbnails, photo(tmp_path, 1), "one")
    assert Image.open(io.BytesIO(first)).format == "JPEG"
    # The tag stands for the file's content, so another file shows which of them was read.
    assert made(thumbnails, photo(tmp_path, 2), "one") is first
    assert made(thumbnails, photo(tmp_path, 2), "two") != first


def test_the_cache_is_limited_and_keeps_the_most_recent(tmp_path: Path) -> None:
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


def test_a_thumbnail_over_the_limit_is_not_cached(tmp_path: Path) -> None:
    thumbnails = Thumbnails(10)
    assert len(made(thumbnails, photo(tmp_path, 1), "one")) > 10
    assert thumbnails.kept_bytes == 0


@pytest.mark.parametrize("content", [b"", b"<svg/>", b"\xff\xd8\xff\xe0 cut short"])
def test_a_file_that_is_no_longer_an_image_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(PhotoNotFound, match="cannot be shown"):
        made(Thumbnails(), path, "one")
