"""What `sbtk index` leaves out: reports, options and stored rules."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sbtk_cli.main import main
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.web.photos import PhotoNotFound, open_photo
from tests.tiny import tiny_photo
from tests.tiny_raw import tiny_dng, two_colours

INDEX = ["index", "photos", "--model", "tiny", "--threads", "1"]
AGAIN = ["index", "photos", "--threads", "1"]


def _indexed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    """Return the report of an update of the gallery."""
    capsys.readouterr()
    assert main([*AGAIN, *arguments, "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert isinstance(report, dict)
    return report


def _kinds(report: dict[str, Any]) -> dict[tuple[str, str], int]:
    return {(item["why"], item["what"]): item["count"] for item in report["left_out"]}


def test_heic_and_raw_files_are_photos(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heif = pytest.importorskip("pillow_heif")
    pytest.importorskip("rawpy")
    heif.register_heif_opener()
    photos = workplace / "photos"
    tiny_photo(101).save(photos / "phone.HEIC", "HEIF")
    tiny_photo(102).save(photos / "canon.hif", "HEIF")
    (photos / "phone.mov").write_bytes(b"\0\0\0\x14ftypqt  ")
    (photos / "phone.aae").write_text("<plist/>")
    tiny_photo(103).save(photos / "web.avif", "AVIF")
    tiny_photo(104).save(photos / "old.JFIF", "JPEG")
    (photos / "alone.DNG").write_bytes(tiny_dng(two_colours((480, 320)), orientation=6))
    (photos / "pair.dng").write_bytes(tiny_dng())
    tiny_photo(105).save(photos / "pair.JPG", "JPEG")
    assert main([*INDEX, "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["live"] == report["new"] == 8 + 6
    assert _kinds(report) == {
        ("raw_beside_jpeg", ".dng"): 1,
        ("not_a_photo", ".aae"): 1,
        ("not_a_photo", ".mov"): 1,
    }
    assert "1 file skipped: 1 .dng: the JPEG of the same name is the photo" in shown.err
    assert "2 files skipped: 1 .aae, 1 .mov: not photos" in shown.err
    assert report["rules"] == {"exclude": [], "include_hidden": False, "follow_links": False}


def test_without_the_extra_its_photos_are_counted_and_named(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = workplace / "photos"
    for name in ("a.heic", "b.HEIC", "c.heif"):
        (photos / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (photos / "d.dng").write_bytes(tiny_dng())
    with monkeypatch.context() as without:
        for module in ("pillow_heif", "rawpy"):
            without.setitem(sys.modules, module, None)
        assert main(INDEX) == 3
        shown = capsys.readouterr()
        assert '3 HEIC photos skipped: pip install "sbtk[photos]"' in shown.err
        assert '1 RAW photo skipped: pip install "sbtk[photos]"' in shown.err
        assert shown.out.startswith("8 photos searchable (8 new) in ")
        assert not (workplace / "gallery.sbtk" / "failures.jsonl").exists()
    pytest.importorskip("rawpy")
    assert _indexed(capsys, code=3)["new"] == 1


def test_exclude_patterns_are_stored_shown_and_removed(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (workplace / "photos" / name).mkdir()
        tiny_photo(ord(name)).save(workplace / "photos" / name / "x.png")
    assert _indexed(capsys)["new"] == 2
    report = _indexed(capsys, "--exclude", "a/")
    assert report["live"] == 9
    assert _kinds(report) == {("excluded", "a"): 1}
    report = _indexed(capsys, "--exclude", "/b")
    assert report["live"] == 8
    assert report["rules"]["exclude"] == ["a/", "/b"]
    assert main(AGAIN) == 0
    printed = capsys.readouterr().err
    assert "the gallery's patterns: a/ /b (--clear-excludes removes them)" in printed
    assert "2 folders skipped: 1 a/, 1 b/: excluded by a pattern" in printed
    report = _indexed(capsys, "--clear-excludes", "--exclude", "/b")
    assert (report["live"], report["rules"]["exclude"]) == (9, ["/b"])
    report = _indexed(capsys, "--clear-excludes")
    assert (report["live"], report["left_out"]) == (10, [])


def test_photos_that_were_excluded_for_a_while_are_not_embedded_again(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*AGAIN, "--exclude", "*.png"]) == 0
    shown = capsys.readouterr()
    png = len(list((workplace / "photos").glob("*.png")))
    assert png
    assert f"{png} photos of the gallery newly excluded" in shown.err
    assert shown.out.startswith(f"{8 - png} photos searchable ({png} missing) in ")
    (workplace / "photos" / "photo-0001.png").unlink()
    report = _indexed(capsys)
    assert (report["missing"], report["left_out_now"], report["missing_in_all"]) == (0, 0, png)
    report = _indexed(capsys, "--clear-excludes")
    assert (report["new"], report["changed"], report["revived"]) == (0, 0, png - 1)
    assert report["live"] == 7


def test_an_ignore_file_applies_to_its_folder(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = workplace / "photos"
    shutil.copytree(photos, workplace / "inner")
    shutil.move(workplace / "inner", photos / "inner")
    (photos / "inner" / ".sbtkignore").write_text("*\n!photo-0001.png\n")
    report = _indexed(capsys)
    assert report["new"] == 1
    (photos / "inner" / ".sbtkignore").write_text("[z-a]\n")
    report = _indexed(capsys, code=3)
    assert (report["live"], report["unreadable"]) == (9, 1)
    assert main(["index", "--list-failed"]) == 0
    assert "photos/inner: the folder was not updated" in capsys.readouterr().out


def test_a_pattern_that_matches_nothing_is_reported(
    gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _indexed(capsys, "--exclude", "photos/photo-0001.png", "--exclude", "!x")
    assert report["live"] == 8
    (notice,) = report["notices"]
    assert "--exclude photos/photo-0001.png excluded nothing" in notice


def test_hidden_folders_and_links_are_included_by_options(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = workplace / "photos"
    for folder in (photos / ".hidden", workplace / "outside"):
        folder.mkdir()
        tiny_photo(len(folder.name)).save(folder / "x.png")
    (photos / "link").symlink_to(workplace / "outside")
    report = _indexed(capsys)
    assert _kinds(report) == {("hidden", ".hidden"): 1, ("link_not_followed", f"{photos}/link"): 1}
    report = _indexed(capsys, "--follow-links", "--include-hidden")
    assert (report["new"], report["left_out"]) == (2, [])
    assert _indexed(capsys)["unchanged"] == 10
    # The server, which follows no link below a root, shows what came through this one.
    with Gallery.open(gallery) as opened:
        open_photo(os.fsencode(photos / "link" / "x.png"), map(os.fsencode, opened.roots())).close()
    report = _indexed(capsys, "--no-follow-links", "--skip-hidden")
    assert report["live"] == 8
    # Named by itself it is indexed, and stays when the folder above it is indexed again.
    assert main(["index", "photos/.hidden", "--threads", "1"]) == 0
    assert _indexed(capsys)["live"] == 9


def test_a_file_named_by_itself_is_indexed(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), "red").save(workplace / ".scan", "PNG")
    assert main(["index", ".scan", "photos", "--threads", "1", "--exclude", "*can"]) == 0
    assert capsys.readouterr().out.startswith("9 photos searchable (1 new) in ")


def test_a_folder_that_became_hidden_is_not_reported_as_a_missing_disk(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "all").mkdir()
    (workplace / "photos").rename(workplace / "all" / ".photos")
    arguments = ["index", "all", "--model", "tiny", "--threads", "1"]
    assert main([*arguments, "--include-hidden"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--skip-hidden"]) == 0
    shown = capsys.readouterr()
    assert "8 photos of the gallery newly excluded" in shown.err
    assert "Warning" not in shown.err
    assert main([*arguments, "--include-hidden"]) == 0
    assert capsys.readouterr().out.startswith("8 photos searchable (8 found again) in ")


def test_a_pattern_that_excludes_everything_changes_nothing(
    gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*AGAIN, "--exclude", "*"]) == 1
    assert "no photo in" in capsys.readouterr().err
    assert _indexed(capsys)["unchanged"] == 8


def test_a_linked_photo_is_shown_until_the_link_leads_elsewhere(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, outside = workplace / "photos", workplace / "outside"
    outside.mkdir()
    for name, colour in (("shown", "red"), ("secret", "blue")):
        Image.new("RGB", (64, 64), colour).save(outside / f"{name}.bmp")
    shown, secret, link = outside / "shown.bmp", outside / "secret.bmp", photos / "link.bmp"
    link.symlink_to(shown)
    (photos / "chain.bmp").symlink_to(link.name)
    assert _indexed(capsys)["new"] == 2
    with Gallery.open(gallery) as opened:
        found = {Path(one.path).name: one for one in map(opened.photo, range(1, 20)) if one}
        roots = list(map(os.fsencode, opened.roots()))

    def content(name: str) -> bytes:
        with open_photo(os.fsencode(photos / name), roots, found[name]) as file:
            return file.read()

    assert content("link.bmp") == content("chain.bmp") == shown.read_bytes()
    # Even with the size and the time of the photo.
    status = shown.stat()
    os.utime(secret, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (secret.stat().st_size, secret.stat().st_mtime_ns) == (
        status.st_size,
        status.st_mtime_ns,
    )
    link.unlink()
    link.symlink_to(secret)
    for name in ("link.bmp", "chain.bmp"):
        with pytest.raises(PhotoNotFound, match="a link to another file"):
            content(name)
    link.unlink()
    link.symlink_to("gone.bmp")
    with pytest.raises(PhotoNotFound):
        content("link.bmp")
    link.unlink()
    link.symlink_to(shown)
    assert content("link.bmp") == shown.read_bytes()
    shown.write_bytes(secret.read_bytes())
    with pytest.raises(PhotoNotFound):
        content("link.bmp")
