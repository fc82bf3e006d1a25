"""`sbtk index` as users type it: counts, codes, the sentence at the end, and interruptions."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sbtk_cli.index import final_sentence
from sbtk_cli.main import main
from sbtk_cli.options import Stopping, Terminated, stops_between_photos
from sbtk_runtime.engines.base import Engine
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.gallery.update import IndexReport
from tests.tiny import tiny_bundle, tiny_photo
from tests.tiny_regions import tiny_map_bundle

INDEX = ["index", "photos", "--threads", "1"]


def report_of(*counts: int, seconds: float = 41.0) -> IndexReport:
    new, changed, moved, missing, unreadable, live = counts
    return IndexReport(
        new=new,
        changed=changed,
        moved=moved,
        revived=0,
        missing=missing,
        missing_in_all=missing,
        removed=0,
        unreadable=unreadable,
        unchanged=0,
        live=live,
        seconds=seconds,
    )


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (
            report_of(12, 1, 0, 3, 2, 1000),
            "1,000 photos searchable (12 new, 1 changed, 3 missing, 2 unreadable: "
            "g.sbtk/failures.jsonl) in 41 s",
        ),
        (report_of(0, 0, 0, 0, 0, 1000), "1,000 photos searchable (nothing new) in 41 s"),
        (report_of(1, 0, 2, 0, 0, 1, seconds=0.61), "1 photo searchable (1 new, 2 moved) in 0.6 s"),
    ],
)
def test_the_report_ends_with_a_summary(report: IndexReport, sentence: str) -> None:
    assert final_sentence(report, Path("g.sbtk")) == sentence


def test_only_what_changed_is_embedded(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = sorted((workplace / "photos").iterdir())
    photos[0].unlink()
    photos[1].rename(photos[1].with_name("moved.png"))
    photos[2].write_bytes(photos[4].read_bytes())
    (workplace / "photos" / "bad.jpg").write_bytes(b"no image")
    assert main(INDEX) == 3
    shown = capsys.readouterr()
    assert shown.out.startswith(
        "7 photos searchable (1 changed, 1 moved, 1 missing, 1 unreadable: "
        "gallery.sbtk/failures.jsonl) in "
    )
    assert "tiny@" in shown.err
    assert re.search(r"\(int8\) on (openvino|onnxruntime) \d", shown.err)


def test_an_engine_is_opened_once_and_only_when_there_is_something_to_embed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[int] = []

    def counted(*arguments: Any, lanes: int = 1, **others: Any) -> Engine:
        opened.append(lanes)
        return open_engine(*arguments, lanes=lanes, **others)

    monkeypatch.setattr("sbtk_runtime.embedding.embedder.open_engine", counted)
    index = ["index", "photos", "--threads", "2"]
    assert main([*index, "--model", "tiny"]) == 0
    assert opened == [2]
    assert main(index) == 0
    (workplace / "photos" / "photo-0000.jpg").unlink()
    (workplace / "photos" / "photo-0001.png").rename(workplace / "photos" / "moved.png")
    assert main(index) == 0
    assert opened == [2]
    assert capsys.readouterr().err.count("tiny@") == 1
    tiny_photo(99).save(workplace / "photos" / "new.png")
    assert main(index) == 0
    assert opened == [2, 2]
    assert capsys.readouterr().err.count("tiny@") == 1


def test_wrong_engine_options_are_refused_even_if_nothing_is_new(
    gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*INDEX, "--engine", "abacus"]) == 2
    assert main([*INDEX, "--device", "tpu"]) == 2
    shown = capsys.readouterr().err
    assert "unknown engine 'abacus'" in shown
    assert "unknown device 'tpu'" in shown


def test_without_a_model_option_the_gallerys_model_is_used(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bundle(workplace / "bundles" / "aaa", seed=5, name="aaa")
    assert main(INDEX) == 0
    assert "nothing new" in capsys.readouterr().out


def test_another_model_is_refused_with_the_command_that_helps(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_bundle(workplace / "bundles" / "other", seed=1, name="other")
    assert main([*INDEX, "--model", "other"]) == 1
    printed = capsys.readouterr().err
    assert "tiny@" in printed
    assert "other@" in printed
    command = next(line for line in printed.splitlines() if "next: sbtk" in line)
    words = command.replace("next: sbtk", "").split()
    assert words[0] == "index"
    assert main(words) == 0, f"{command!r} should work ({other})"


def test_json_is_one_object(gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*INDEX, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["live"] == report["unchanged"] == 8
    assert report["new"] == report["unreadable"] == 0


def test_quiet_prints_only_the_summary(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*INDEX, "--model", "tiny", "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("8 photos searchable (8 new) in ")
    assert shown.err == ""


def test_the_gallerys_folder_may_come_from_the_environment(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBTK_GALLERY", "elsewhere.sbtk")
    assert main([*INDEX, "--model", "tiny"]) == 0
    assert (workplace / "elsewhere.sbtk" / "manifest.json").is_file()


def test_failed_files_are_listed(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "photos" / "empty.jpg").touch()
    (workplace / "photos" / os.fsdecode(b"bad\n\xff.jpg")).write_bytes(b"no image")
    assert main(INDEX) == 3
    capsys.readouterr()
    assert main(["index", "--list-failed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert any(line.endswith("empty.jpg: the file is empty") for line in lines)
    assert any("bad\\n\\xff.jpg: not an image" in line for line in lines)
    assert main(["index", "--list-failed", "--json"]) == 0
    failures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(failures, key=len)[0].keys() >= {"reason"}
    assert any("path_bytes" in failure for failure in failures)


def test_partly_readable_photos_are_counted_and_listed(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_photo(31).resize((320, 240)).save(workplace / "whole.jpg")
    cut = (workplace / "whole.jpg").read_bytes()
    for name in ("cut.jpg", "copy.jpg"):
        (workplace / "photos" / name).write_bytes(cut[: len(cut) * 97 // 100])
    assert main(INDEX) == 0
    printed = capsys.readouterr().err
    assert "2 photos are only partly readable: 'sbtk index --list-failed" in printed
    # Later runs do not forget it.
    assert main([*INDEX, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["unchanged"], report["unreadable"], report["partly_readable"]) == (10, 0, 2)
    assert main(["index", "--list-failed", "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(item["path"]).name for item in listed] == ["copy.jpg", "cut.jpg"]
    assert all(item["reason"].startswith("partly readable: 9") for item in listed)
    # Photos that are not there any more are not of interest.
    (workplace / "photos" / "cut.jpg").unlink()
    assert main([*INDEX, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["partly_readable"] == 1


def test_an_edit_that_keeps_date_and_size_is_found(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = workplace / "photos" / "uncompressed.bmp"
    tiny_photo(1).resize((64, 64)).save(photo)
    assert main(INDEX) == 0
    before = photo.stat()
    tiny_photo(2).resize((64, 64)).save(photo)
    os.utime(photo, ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    assert main(INDEX) == 0
    assert "1 changed" in capsys.readouterr().out
    assert main([*INDEX, "--checksum"]) == 0
    assert "nothing new" in capsys.readouterr().out


def test_an_unmounted_disk_loses_no_embeddings(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = workplace / "photos"
    count = len(list(photos.iterdir()))
    photos.rename(workplace / "away")
    photos.mkdir()
    for is_there in (True, False):
        if not is_there:
            photos.rmdir()
        assert main(INDEX) == 3
        shown = capsys.readouterr()
        assert "Warning: no photos were found in" in shown.err
        assert shown.out.startswith("0 photos searchable")
    assert main(["query", "photos/x.jpg"]) == 1
    assert main(["index", "--list-folders"]) == 0
    assert f"photos (not found): 0 photos, {count} missing" in capsys.readouterr().out
    # One of its photos has been deleted since.
    one = min((workplace / "away").iterdir())
    one.rename(workplace / one.name)
    (workplace / "away").rename(photos)
    assert main(INDEX) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{count - 1} photos searchable ({count - 1} found again) in ")
    assert "Warning" not in shown.err
    (workplace / one.name).rename(photos / one.name)
    assert main(INDEX) == 0
    assert capsys.readouterr().out.startswith(f"{count} photos searchable (1 found again) in ")
    assert main(["index", "--list-folders", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(photos),
        "photos": count,
        "missing": 0,
        "exists": True,
    }


def test_prune_drops_missing_photos_and_forget_drops_folders(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = workplace / "photos"
    count = len(list(photos.iterdir()))
    next(photos.iterdir()).unlink()
    assert main([*INDEX, "--prune"]) == 0
    shown = capsys.readouterr().out
    assert f"({1} missing) in " in shown
    assert f"1 missing photo removed from photos; {count - 1} photos searchable" in shown
    shutil.rmtree(photos)
    photos.mkdir()
    assert main([*INDEX, "--prune"]) == 3
    assert "Nothing was pruned" in capsys.readouterr().err
    photos.rmdir()
    assert main(["index", "--forget", "photos"]) == 0
    out = capsys.readouterr().out
    assert f"{count - 1} photos removed from photos; 0 photos searchable" in out
    assert main(["index", "--list-folders"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["index", "--forget", "photos"]) == 1
    assert "has no photo below" in capsys.readouterr().err


def test_missing_folders_are_reported_before_a_model_is_loaded(
    gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", "nosuch/", "--model", "nowhere"]) == 1
    shown = capsys.readouterr().err
    assert "nosuch cannot be read: No such file" in shown
    assert "nowhere" not in shown


def test_verify_finds_damage(gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "--verify"]) == 0
    assert "8 photos intact; 8 of 8" in capsys.readouterr().out
    codes = next(gallery.glob("codes-*/*.bits"))
    data = bytearray(codes.read_bytes())
    data[len(data) // 2] ^= 1
    codes.write_bytes(data)
    assert main(["index", "--verify"]) == 1
    assert "problem: " in capsys.readouterr().out
    assert main(["index", "--verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"]


def test_export_writes_standard_formats(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", "--export", "out"]) == 0
    assert capsys.readouterr().out.startswith("8 photos in out/embeddings.npy, out/photos.csv")
    embeddings = np.load(workplace / "out" / "embeddings.npy")
    with (workplace / "out" / "photos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert embeddings.shape == (8, 16)
    assert {row["path"] for row in rows} == {str(p) for p in (workplace / "photos").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index"], "sbtk index photos/"),
        (["index", "photos", "--repair"], "--verify"),
        (["index", "photos", "--threads", "0"], "--threads"),
        (["index", "photos", "--batch", "many"], "--batch"),
        (["index", "--verify", "--exclude", "*.png"], "require the folders"),
        (["index", "--list-failed", "--clear-excludes"], "require the folders"),
        (["index", "photos", "--exclude", "[z-a]"], "the pattern '[z-a]' matches nothing"),
        (["index", "photos", "--exclude", ""], "the pattern '' matches nothing"),
    ],
)
def test_usage_errors_have_exit_code_2(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "gallery.sbtk").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "nowhere", "--model", "tiny"], "nowhere"),
        (["index", "empty", "--model", "tiny"], "no photo in"),
        (["index", "bad", "--model", "tiny"], "0 of 2 files could be read"),
        (["index", "photos", "--model", "no-such"], "no-such"),
        (["index", "photos", "--model", "tiny", "--gallery", "bad"], "holds other files"),
        (["index", "photos", "--model", "tiny", "--gallery", "bad/a.jpg"], "bad/a.jpg is a file"),
        (["index", "", "--model", "tiny"], "an empty path"),
        (["index", "photos", "--model", "tiny", "--engine", "warp"], "warp"),
        (["index", "--verify"], "there is no gallery gallery.sbtk"),
        (["index", "--list-failed", "--gallery", "g h"], "--gallery 'g h'"),
    ],
)
def test_errors_say_what_cannot_be_done(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (workplace / "empty").mkdir()
    (workplace / "bad").mkdir()
    for name in ("a.jpg", "b.png"):
        (workplace / "bad" / name).write_bytes(b"no image")
    assert main(arguments) in (1, 2)
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not (workplace / "gallery.sbtk" / "manifest.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_loses_nothing(workplace: Path, number: signal.Signals, code: int) -> None:
    for index in range(200):
        source = workplace / "photos" / "photo-0001.png"
        shutil.copy(source, workplace / "photos" / f"copy-{index}.png")
    command = [sys.executable, "-m", "sbtk_cli", *INDEX, "--model", "tiny", "--batch", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (workplace / "gallery.sbtk" / ".lock").exists():
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert out == ""
    assert "Run the same command to resume." in err
    assert "Traceback" not in err
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0
    assert finished.stdout.startswith("208 photos searchable (")


@pytest.fixture
def stopping() -> Iterator[Stopping]:
    before = signal.getsignal(signal.SIGINT)
    with stops_between_photos() as held:
        yield held
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_waits_for_the_photo(stopping: Stopping) -> None:
    stopping.between_photos(more_to_come=True)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stopping.between_photos(more_to_come=True)


def test_a_second_signal_does_not_wait(stopping: Stopping) -> None:
    stopping.between_photos(more_to_come=True)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_between_batches_a_signal_ends_the_command_at_once(stopping: Stopping) -> None:
    stopping.between_photos(more_to_come=False)
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)


def test_regions_are_indexed_and_found_and_bad_counts_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_map_bundle(tmp_path / "model")
    colours = {"red": (230, 20, 20), "blue": (20, 30, 240)}
    (tmp_path / "photos").mkdir()
    for name, colour in colours.items():
        photo = Image.new("RGB", (400, 300), (40, 200, 210))
        photo.paste(Image.new("RGB", (140, 110), colour), (260, 190))
        photo.save(tmp_path / "photos" / f"{name}.png")
        Image.new("RGB", (300, 300), colour).save(tmp_path / f"{name}.png")
    words = ["--model", "model", "--engine", "onnxruntime"]
    assert main(["index", "photos", "--regions", *words, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["regions"] == 32
    assert "32 regions" in printed.err
    query = ["query", "red.png", "--as", "photo", "--model", "model", "--json"]
    assert main([*query, "--engine", "onnxruntime"]) == 0
    hit = json.loads(capsys.readouterr().out.splitlines()[0])
    assert hit["path"].endswith("photos/red.png")
    x, y, width, height = hit["region"]
    assert x + width > 0.95
    assert y + height > 0.95
    # Turned since: its frame would be elsewhere.
    turned = ["--engine", "onnxruntime", "-k", "2", "--html", "sheet.html"]
    for is_turned in (False, True):
        if is_turned:
            photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photos" / "blue.png")
        assert main([*query, *turned, "--search", "exact"]) == 0
        printed = capsys.readouterr()
        assert ("1 of these 2 photos changed after" in printed.err) == is_turned
        regions = [json.loads(line).get("region") for line in printed.out.splitlines()]
        frames = (tmp_path / "sheet.html").read_text().count(':35.71%"></i>')
        assert frames == 2 - regions.count(None) - is_turned
    photo.save(tmp_path / "photos" / "blue.png")
    assert main([*query, "--engine", "onnxruntime", "--no-regions"]) == 0
    assert "region" not in json.loads(capsys.readouterr().out.splitlines()[0])
    assert main(["index", "photos", "--regions=9", *words]) == 1
    assert "keeps 16 regions of each photo, not 9" in capsys.readouterr().err
    assert main(["index", "--regions", "photos", *words]) == 2
    assert "'photos' is not 9 or 16" in capsys.readouterr().err
    assert main(["index", "photos", "--regions", "--bits", "8", "--gallery", "b", *words]) == 1
    assert not (tmp_path / "b").exists()
