"""The walk finds every photo once and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sbtk_runtime.errors import BadData
from sbtk_runtime.walk import Found, Skipped, absolute_roots, walk


def _touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _split(roots: list[Path]) -> tuple[list[Found], list[Skipped]]:
    items = list(walk(absolute_roots(roots)))
    found = sorted((i for i in items if isinstance(i, Found)), key=lambda item: item.path)
    return found, [i for i in items if isinstance(i, Skipped)]


def test_finds_images_by_suffix_at_every_depth(tmp_path: Path) -> None:
    wanted = [_touch(tmp_path / "a" / "b" / "c.JPG"), _touch(tmp_path / "z.png", b"12345")]
    _touch(tmp_path / "notes.txt")
    found, skipped = _split([tmp_path])
    assert [item.path for item in found] == [str(path) for path in wanted]
    assert found[1].size_bytes == 5
    assert found[1].mtime_ns == wanted[1].stat().st_mtime_ns
    assert skipped == []


def test_overlapping_roots_give_each_photo_once(tmp_path: Path) -> None:
    _touch(tmp_path / "inner" / "a.jpg")
    found, _ = _split([tmp_path, tmp_path / "inner", tmp_path])
    assert len(found) == 1


def test_a_file_named_as_root_counts_whatever_its_suffix(tmp_path: Path) -> None:
    found, _ = _split([_touch(tmp_path / "scan.dat")])
    assert len(found) == 1


def test_links_to_folders_are_not_followed_and_links_to_files_are(tmp_path: Path) -> None:
    photo = _touch(tmp_path / "real" / "a.jpg")
    (tmp_path / "real" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "real" / "linked.jpg").symlink_to(photo)
    found, skipped = _split([tmp_path])
    assert [Path(item.path).name for item in found] == ["a.jpg", "linked.jpg"]
    assert skipped == []


def test_a_root_that_is_a_link_is_followed(tmp_path: Path) -> None:
    _touch(tmp_path / "real" / "a.jpg")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real", target_is_directory=True)
    found, _ = _split([link])
    assert [item.path for item in found] == [str(link / "a.jpg")]


def test_dangling_and_circular_links_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    found, skipped = _split([tmp_path])
    assert found == []
    assert len(skipped) == 2
    assert not any(item.may_hide_photos for item in skipped)


def test_a_fifo_is_skipped_with_a_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    _, skipped = _split([tmp_path])
    assert [item.reason for item in skipped] == ["not a regular file"]


def test_odd_names_survive(tmp_path: Path) -> None:
    names = [b"line\nend.jpg", b"not-\xff\xfe-utf8.png", "bild-\u00fc-\U0001f600.jpg".encode()]
    for name in names:
        _touch(tmp_path / os.fsdecode(name))
    found, _ = _split([tmp_path])
    assert sorted(os.fsencode(Path(item.path).name) for item in found) == sorted(names)


def test_a_missing_root_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="nowhere"):
        absolute_roots([tmp_path / "nowhere"])
    with pytest.raises(BadData):
        absolute_roots([])


def test_a_file_in_place_of_a_folder_is_no_traceback(tmp_path: Path) -> None:
    photo = _touch(tmp_path / "a.jpg")
    found, _ = _split([photo])
    assert found[0].path == str(photo)
