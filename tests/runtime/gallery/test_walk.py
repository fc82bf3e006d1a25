"""The walk finds every photo once and nothing else."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from sbtk_runtime.errors import BadData
from sbtk_runtime.gallery.folder import absolute_roots
from sbtk_runtime.gallery.walk import (
    Followed,
    Found,
    LeftOut,
    LeftOutTally,
    Skipped,
    left_out_sentences,
    refuse_nothing,
    walk,
)
from sbtk_runtime.gallery.walk_rules import WalkRules, Why


def _touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _names(root: Path, rules: WalkRules | None = None, known: tuple[Path, ...] = ()) -> set[str]:
    """Return the photos below a root, relative to it."""
    items = walk([str(root)], rules or WalkRules(), map(str, known))
    return {os.path.relpath(item.path, root) for item in items if isinstance(item, Found)}


def _left_out(root: Path, rules: WalkRules | None = None) -> dict[str, Why]:
    items = walk([str(root)], rules or WalkRules())
    return {
        os.path.relpath(item.path, root): item.why for item in items if isinstance(item, LeftOut)
    }


def _sentences(root: Path, rules: WalkRules | None = None) -> list[str]:
    tally = LeftOutTally()
    for item in walk([str(root)], rules or WalkRules()):
        if isinstance(item, LeftOut):
            tally.add(item)
    return left_out_sentences(tally.counts())


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


def test_overlapping_roots_yield_each_photo_once(tmp_path: Path) -> None:
    _touch(tmp_path / "inner" / "a.jpg")
    found, _ = _split([tmp_path, tmp_path / "inner", tmp_path])
    assert len(found) == 1


def test_a_file_given_as_a_root_is_a_photo_with_any_suffix(tmp_path: Path) -> None:
    found, _ = _split([_touch(tmp_path / "scan.dat")])
    assert len(found) == 1


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
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


def test_dangling_and_circular_links_are_harmless(tmp_path: Path) -> None:
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


def test_unusual_names_survive(tmp_path: Path) -> None:
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


def test_a_file_in_place_of_a_folder_is_reported(tmp_path: Path) -> None:
    photo = _touch(tmp_path / "a.jpg")
    found, _ = _split([photo])
    assert found[0].path == str(photo)


def test_other_files_are_counted_by_suffix(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.MOV", "b.mov", "c.Mov", "a.xmp", "a.pdf", "LICENCE", "x.svg"):
        _touch(tmp_path / name)
    assert _names(tmp_path) == {"a.jpg"}
    assert _sentences(tmp_path) == [
        "1 file skipped: 1 .svg: image formats that sbtk does not read",
        "6 files skipped: 3 .mov, 1 without a suffix, 1 .pdf, 1 .xmp: not photos",
    ]


def test_hidden_and_system_folders_are_not_entered(tmp_path: Path) -> None:
    _touch(tmp_path / "a.jpg")
    for name in ("._a.jpg", ".cache/b.jpg", "@eaDir/a.jpg/small.jpg", "2019/@eaDir/c.jpg"):
        _touch(tmp_path / name)
    _touch(tmp_path / "Thumbs.db")
    assert _names(tmp_path) == {"a.jpg"}
    assert _left_out(tmp_path) == dict.fromkeys(
        ("._a.jpg", ".cache", "@eaDir", "2019/@eaDir", "Thumbs.db"), Why.HIDDEN
    )
    assert _sentences(tmp_path) == [
        "2 files and 3 folders skipped: 1 .db, 1 .jpg, 2 @eaDir/, 1 .cache/: hidden or system "
        "files (--include-hidden includes them)"
    ]
    assert len(_names(tmp_path, WalkRules(include_hidden=True))) == 5


@pytest.mark.parametrize("name", [".hidden", "@eaDir", "lost+found", "X.lrdata", "a/.b/c"])
def test_a_root_is_walked_even_if_hidden(tmp_path: Path, name: str) -> None:
    _touch(tmp_path / name / "a.jpg")
    _touch(tmp_path / name / ".deeper" / "b.jpg")
    root = tmp_path / name
    assert _names(root) == {"a.jpg"}
    # And it stays in the gallery when a folder above it is walked alone.
    assert _names(tmp_path) == set()
    assert _names(tmp_path, known=(root,)) == {f"{name}/a.jpg"}
    found, _ = _split([tmp_path, root])
    assert [item.path for item in found] == [str(root / "a.jpg")]


def test_former_roots_can_be_excluded(tmp_path: Path) -> None:
    root = _touch(tmp_path / ".private" / "a.jpg").parent
    photo = _touch(tmp_path / ".b.jpg")
    assert _names(tmp_path, known=(root, photo)) == {".private/a.jpg", ".b.jpg"}
    for pattern in (".private/", ".private", ".private/*"):
        rules = WalkRules(exclude=(pattern,))
        assert _names(tmp_path, rules, known=(root, photo)) == {".b.jpg"}
    (tmp_path / ".sbtkignore").write_text("*.jpg\n")
    assert _names(tmp_path, known=(root, photo)) == set()
    assert _names(tmp_path, known=(tmp_path / ".never" / "was",)) == set()


def test_a_file_given_as_a_root_is_a_photo_even_if_hidden_or_excluded(tmp_path: Path) -> None:
    photo = _touch(tmp_path / ".a.png")
    rules = WalkRules(exclude=("*.png",))
    items = list(walk([str(tmp_path), str(photo)], rules))
    assert [item.path for item in items if isinstance(item, Found)] == [str(photo)]
    assert not [item for item in items if isinstance(item, LeftOut)]


def test_rules_apply_alike_from_any_folder_above_a_photo(tmp_path: Path) -> None:
    for name in ("a.jpg", "2019/a.jpg", "2019/b.png", "2019/raw/c.jpg", "raw/d.jpg"):
        _touch(tmp_path / name)
    (tmp_path / ".sbtkignore").write_text("*.png\n")
    rules = WalkRules(exclude=("/2019/raw/",))
    assert _names(tmp_path, rules) == {"a.jpg", "2019/a.jpg", "raw/d.jpg"}
    inner = tmp_path / "2019"
    assert _names(inner, rules, known=(tmp_path,)) == {"a.jpg"}
    assert _names(inner, rules) == {"a.jpg", "b.png", "raw/c.jpg"}  # nothing above is known
    # It is the folder that was named, so what is in it counts.
    assert _names(inner / "raw", rules, known=(tmp_path,)) == {"c.jpg"}
    for roots in ([inner, tmp_path], [tmp_path, inner]):
        items = walk([str(root) for root in roots], rules)
        found = {os.path.relpath(item.path, tmp_path) for item in items if isinstance(item, Found)}
        assert found == {"a.jpg", "2019/a.jpg", "raw/d.jpg"}
    (tmp_path / ".sbtkignore").write_text("[z-a]\n")
    assert _names(inner, rules, known=(tmp_path,)) == set()


def test_excluded_folders_are_not_entered(tmp_path: Path) -> None:
    for name in ("a.jpg", "drafts/a.jpg", "2019/drafts/b.jpg", "2019/b.png"):
        _touch(tmp_path / name)
    rules = WalkRules(exclude=("drafts/", "*.png"))
    assert _names(tmp_path, rules) == {"a.jpg"}
    assert _sentences(tmp_path, rules) == [
        "1 file and 2 folders skipped: 1 .png, 2 drafts/: excluded by a pattern"
    ]


@pytest.mark.parametrize("content", [b"*.png\n[z-a]\n", b"!\n", b"a\n" * 600_000])
def test_a_folder_with_an_invalid_ignore_file_keeps_its_photos(
    tmp_path: Path, content: bytes
) -> None:
    _touch(tmp_path / "private" / "a.jpg")
    _touch(tmp_path / "private" / "deep" / "a.jpg")
    _touch(tmp_path / "b.jpg")
    (tmp_path / "private" / ".sbtkignore").write_bytes(content)
    found, skipped = _split([tmp_path])
    assert [Path(item.path).name for item in found] == ["b.jpg"]
    (only,) = skipped
    assert only.path == str(tmp_path / "private")
    assert only.may_hide_photos
    assert ".sbtkignore cannot be read" in only.reason


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_an_ignore_file_must_be_a_regular_file(tmp_path: Path, kind: str) -> None:
    _touch(tmp_path / "a.jpg")
    path = tmp_path / ".sbtkignore"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    found, skipped = _split([tmp_path])
    assert found == []
    assert len(skipped) == 1


@pytest.mark.parametrize("is_reader_there", [True, False])
def test_raw_and_jpeg_of_one_name_are_one_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_reader_there: bool
) -> None:
    if is_reader_there:
        pytest.importorskip("rawpy")
        pytest.importorskip("pillow_heif")
    else:
        monkeypatch.setitem(sys.modules, "rawpy", None)
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("a.CR2", "A.jpg", "b.nef", "b.JPEG", "c.dng", "d.arw", "d.heic", "e.raf", "e.png"):
        _touch(tmp_path / name)
    _touch(tmp_path / "other" / "c.jpg")
    _touch(tmp_path / "f.orf")
    (tmp_path / "f.jpg").symlink_to("nowhere")
    (tmp_path / "g.rw2").symlink_to("c.dng")
    (tmp_path / "g.jpg").symlink_to("g.jpg")
    jpegs = {"A.jpg", "b.JPEG", "e.png", "other/c.jpg"}
    alone = {"c.dng", "e.raf", "f.orf", "g.rw2"}
    left_out = _left_out(tmp_path)
    assert left_out.pop("a.CR2") == left_out.pop("b.nef") == Why.RAW_BESIDE_JPEG
    if is_reader_there:
        assert _names(tmp_path) == jpegs | alone | {"d.heic"}
        assert left_out == {"d.arw": Why.RAW_BESIDE_JPEG}
    else:
        assert _names(tmp_path) == jpegs
        assert left_out.pop("d.heic") == Why.HEIC_READER_MISSING
        assert left_out == dict.fromkeys(alone | {"d.arw"}, Why.RAW_READER_MISSING)


def test_a_raw_file_is_the_photo_if_its_jpeg_is_excluded_or_hidden(tmp_path: Path) -> None:
    pytest.importorskip("rawpy")
    for name in ("a.cr2", "a.jpg", ".b.jpg", "b.cr2"):
        _touch(tmp_path / name)
    assert _names(tmp_path) == {"a.jpg", "b.cr2"}
    assert _names(tmp_path, WalkRules(exclude=("*.jpg",))) == {"a.cr2", "b.cr2"}
    assert _names(tmp_path, WalkRules(exclude=("*.cr2",))) == {"a.jpg"}
    assert _names(tmp_path / "a.cr2") == {"."}


def test_raw_and_jpeg_given_separately_are_one_photo(tmp_path: Path) -> None:
    pytest.importorskip("rawpy")
    names = ("a.CR2", "a.JPG", "b.cr2")
    roots = [str(_touch(tmp_path / name)) for name in names]
    items = list(walk(roots))
    assert [item.path for item in items if isinstance(item, Found)] == roots[1:]
    assert [item.why for item in items if isinstance(item, LeftOut)] == [Why.RAW_BESIDE_JPEG]


def test_photos_without_a_decoder_name_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("rawpy", "pillow_heif"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("a.HEIC", "b.heic", "c.hif", "d.CR2"):
        _touch(tmp_path / name)
    assert _sentences(tmp_path) == [
        '3 HEIC photos skipped: pip install "sbtk[photos]"',
        '1 RAW photo skipped: pip install "sbtk[photos]"',
    ]
    with pytest.raises(BadData, match=r"no photo in .*3 HEIC photos skipped") as caught:
        refuse_nothing([str(tmp_path)])
    assert caught.value.next_step == 'pip install "sbtk[photos]"'
    with pytest.raises(BadData, match="1 HEIC photo skipped"):
        refuse_nothing([str(tmp_path / "a.HEIC")])


def test_links_to_folders_are_named_unless_they_lead_inside_the_roots(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", _touch(tmp_path / "outside" / "b.jpg").parent
    _touch(root / "real" / "a.jpg")
    (root / "link").symlink_to(outside)
    (root / "same").symlink_to(root / "real")
    (root / "real" / "up").symlink_to(root)
    (root / ".hidden").symlink_to(outside)
    assert _names(root) == {"real/a.jpg"}
    assert _left_out(root) == {"link": Why.LINK, ".hidden": Why.HIDDEN}
    assert f"1 link to a folder not followed: {root}/link: --follow-links follows such links" in (
        " ".join(_sentences(root))
    )


def test_links_are_followed_after_real_folders_and_without_loops(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", _touch(tmp_path / "outside" / "b.jpg").parent
    _touch(root / "zzz" / "a.jpg")
    _touch(outside / "deep" / "c.jpg")
    (outside / "round").symlink_to(outside)
    (outside / "back").symlink_to(root)
    (root / "aaa").symlink_to(root / "zzz")
    (root / "link").symlink_to(outside)
    (root / "twice").symlink_to(outside)
    (root / "skip").symlink_to(outside / "deep")
    rules = WalkRules(follow_links=True, exclude=("skip/",))
    assert _names(root, rules) == {"zzz/a.jpg", "link/b.jpg", "link/deep/c.jpg"}
    followed = [item.path for item in walk([str(root)], rules) if isinstance(item, Followed)]
    assert followed == [str(root / "link")]
    assert _left_out(root, rules) == {"skip": Why.EXCLUDED}


def test_counts_by_suffix_add_up(tmp_path: Path) -> None:
    for index in range(70):
        _touch(tmp_path / f"a.{index:03}")
        _touch(tmp_path / f"b.{index:03}")
    tally = LeftOutTally()
    for item in walk([str(tmp_path)]):
        if isinstance(item, LeftOut):
            tally.add(item)
    counts = tally.counts()
    assert sum(count.count for count in counts) == 140
    assert len(counts) == 51
    (sentence,) = left_out_sentences(counts)
    assert sentence.startswith("140 files skipped: ")
    said = [int(number) for number in re.findall(r"(\d+) (?:\.|others|more)", sentence)]
    assert sum(said) == 140


def test_the_gallerys_own_files_are_not_counted(tmp_path: Path) -> None:
    _touch(tmp_path / "gallery.sbtk" / "manifest.json")
    _touch(tmp_path / "gallery.sbtk" / "vectors" / "a.npy")
    _touch(tmp_path / "a.jpg")
    items = list(walk([str(tmp_path)], gallery=str(tmp_path / "gallery.sbtk")))
    assert [item.path for item in items] == [str(tmp_path / "a.jpg")]
