"""Patterns mean what they mean to git, and names say what a file is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.gallery.walk import Found, walk
from sbtk_runtime.gallery.walk_rules import (
    Formats,
    RuleChange,
    WalkRules,
    Why,
    is_hidden,
    patterns_of,
    read_ignore_file,
    suffix_of,
)

TREE = [
    "a.jpg",
    "b.png",
    "keep.png",
    "x1.jpg",
    "drafts/a.jpg",
    "drafts/keep.png",
    "drafts/deep/b.png",
    "2019/a.jpg",
    "2019/drafts/a.jpg",
    "2019/scans/a.jpg",
    "2019/scans/keep.png",
    "2019/scans/deep/c.png",
    "build/a.jpg",
    "build/build/a.png",
    "sub/build/a.jpg",
    "sub/keep/a.png",
]
LINES = st.sampled_from(
    [
        "*.png",
        "!keep.png",
        "drafts/",
        "drafts",
        "/drafts",
        "drafts/*",
        "!drafts/keep.png",
        "2019/**/a.jpg",
        "**/scans",
        "2019/scans/*",
        "*",
        "!*/",
        "!*.jpg",
        "/*",
        "!/2019/",
        "build",
        "!sub/build",
        "**/deep/**",
        "x[0-9].jpg",
        "x[!2].jpg",
        "?.jpg",
        "#comment",
        "\\!keep.png",
        "2019/*/a.jpg",
        "*/drafts",
        "/2019/scans/",
        "!keep/",
        "[ab].*",
        "**/",
        "a/**",
    ]
)


def _lines(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)


def _plant(folder: Path, ignore_files: dict[str, str]) -> None:
    for name in TREE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    for where, text in ignore_files.items():
        for name in (".sbtkignore", ".gitignore"):
            (folder / where / name).write_bytes(text.encode())


def _found(folder: Path, *exclude: str) -> set[str]:
    items = walk([str(folder)], WalkRules(exclude=exclude))
    return {os.path.relpath(item.path, folder) for item in items if isinstance(item, Found)}


def _kept_by_git(folder: Path) -> set[str]:
    """Return which files of the tree git would take, which is our oracle."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
    }
    for command in (["init", "-q"], ["ls-files", "-z", "--others", "--exclude-standard"]):
        done = subprocess.run(
            ["git", "-C", str(folder), *command], env=environment, capture_output=True, check=True
        )
    return set(os.fsdecode(done.stdout).split("\0")) & set(TREE)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@settings(max_examples=40)
@given(top=st.lists(LINES, max_size=5), below=st.lists(LINES, max_size=3))
def test_patterns_match_as_in_git(
    tmp_path_factory: pytest.TempPathFactory, top: list[str], below: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    _plant(folder, {"": _lines(*top), "2019": _lines(*below)})
    kept = _kept_by_git(folder)
    assert _found(folder) == kept
    if not below:
        (folder / ".sbtkignore").unlink()
        (folder / "2019" / ".sbtkignore").unlink()
        patterns = [line for line in top if not line.startswith("#")]
        assert _found(folder, *patterns) == kept
    shutil.rmtree(folder)


def test_patterns_of_the_command_line_win(tmp_path: Path) -> None:
    _plant(tmp_path, {"": "*.png\n!keep.png\n", "2019": "!*.png\n"})
    png = {name for name in _found(tmp_path) if name.endswith(".png")}
    kept = {"keep.png", "drafts/keep.png"}
    assert png == {*kept, "2019/scans/keep.png", "2019/scans/deep/c.png"}
    assert not {name for name in _found(tmp_path, "*.png") if name.endswith(".png")}
    assert "b.png" in _found(tmp_path, "!b.png")


def test_ignore_files_may_have_line_ends_of_other_systems(tmp_path: Path) -> None:
    (tmp_path / ".sbtkignore").write_bytes(
        b"\xef\xbb\xbf*.png\r\ndrafts/  \r\n\r\n# none\r\nb\xff*"
    )
    texts = [pattern.text for pattern in read_ignore_file(str(tmp_path))]
    assert texts == ["*.png", "drafts/", os.fsdecode(b"b\xff*")]


def test_names_with_line_breaks_and_odd_bytes_are_matched_completely(tmp_path: Path) -> None:
    for name in (b"a\nb/x.png", b"y.png\n.jpg", b"\xff.png"):
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert _found(tmp_path, "*.png") == {"y.png\n.jpg"}
    assert _found(tmp_path, os.fsdecode(b"\xff*"), "a?b/") == {"y.png\n.jpg"}


@pytest.mark.parametrize("text", ["", " ", "# remark", "/", "!", "[", "x[z-a]", "\\", "a\nb"])
def test_patterns_that_can_match_nothing_are_refused(text: str) -> None:
    with pytest.raises(BadConfig) as caught:
        patterns_of(["*.png", text])
    assert repr(text) in caught.value.found
    assert caught.value.exit_code == 2
    with pytest.raises(BadConfig):
        RuleChange(exclude=(text,)).applied_to(WalkRules())


def test_changes_add_and_remove_rules() -> None:
    rules = RuleChange(("*.png", "drafts/", "*.png")).applied_to(WalkRules())
    assert rules == WalkRules(("*.png", "drafts/"))
    assert RuleChange().applied_to(rules) == rules
    assert RuleChange(("*.png",)).applied_to(rules).exclude == ("drafts/", "*.png")
    assert RuleChange(("a",), clear_excludes=True).applied_to(rules).exclude == ("a",)
    assert RuleChange(clear_excludes=True).applied_to(rules) == WalkRules()
    opened = RuleChange(include_hidden=True, follow_links=True).applied_to(rules)
    assert opened == WalkRules(rules.exclude, include_hidden=True, follow_links=True)
    assert RuleChange(follow_links=False).applied_to(opened).include_hidden


@pytest.mark.parametrize(
    "name",
    [
        ".git",
        ".thumbnails",
        "._a.jpg",
        ".@__thumb",
        ".Trash-1000",
        "@eaDir",
        "@EADIR",
        "#recycle",
        "#snapshot",
        "$RECYCLE.BIN",
        "lost+found",
        "__MACOSX",
        "Thumbs.db",
        "thumbs.db",
        "Thumbnails",
        "Lightroom.lrdata",
        "X.LRDATA",
        "desktop.ini",
        "System Volume Information",
        "system volume information",
    ],
)
def test_hidden_and_system_names_are_recognised(name: str) -> None:
    assert is_hidden(name, "photos", is_folder=True)


@pytest.mark.parametrize("name", ["holidays", "a.b", "eaDir", "recycle", "_a.jpg", "lrdata"])
def test_other_names_are_not_hidden(name: str) -> None:
    assert not is_hidden(name, "photos", is_folder=True)


def test_only_the_originals_of_a_photo_library_are_indexed() -> None:
    library = "Photos Library.photoslibrary"
    assert not is_hidden("originals", library, is_folder=True)
    assert not is_hidden("Masters", "Old.aplibrary", is_folder=True)
    for name in ("resources", "database", "private", "derivatives"):
        assert is_hidden(name, library, is_folder=True)
        assert not is_hidden(name, "photos", is_folder=True)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *(
            (name, None)
            for name in ("a.JPG", "a.jfif", "a.JPE", "a.mpo", "a.avif", "a.PgM", "a.TIFF")
        ),
        *(
            (f"a{suffix}", Why.HEIC_READER_MISSING)
            for suffix in (".HEIC", ".heif", ".hif", ".Heics")
        ),
        *((f"a{suffix}", Why.RAW_READER_MISSING) for suffix in (".CR2", ".cr3", ".NEF", ".arw")),
        *((f"a{suffix}", Why.RAW_READER_MISSING) for suffix in (".dng", ".RAF", ".orf", ".rw2")),
        *((f"a{suffix}", Why.OTHER_IMAGE) for suffix in (".svg", ".PSD", ".jxl", ".ico")),
        *((f"a{suffix}", Why.NOT_A_PHOTO) for suffix in (".mov", ".XMP", ".aae", ".pdf", "", ".")),
        ("a.jpg~", Why.NOT_A_PHOTO),
        ("a.jpg.part", Why.NOT_A_PHOTO),
    ],
)
def test_suffixes_give_the_kind_of_a_file(
    name: str, why: Why | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pillow_heif", "rawpy"):
        monkeypatch.setitem(sys.modules, module, None)
    assert Formats().why_not(suffix_of(name)) == why
