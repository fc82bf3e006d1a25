"""A full disk ends an update with a clear error; once there is space, it resumes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sbtk_runtime.errors import DiskFull
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import IndexReport
from sbtk_runtime.gallery.verify import verify_gallery
from tests.tiny import tiny_bundle, write_photos
from tests.tiny_gallery import contents, index, processes

#: From too small for a catalogue to enough for all; the steps hit each kind of file.
SIZES_KIB = (8, 48, *range(96, 400, 20), 8000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few KiB; `resize` changes that."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZES_KIB[0]}k", "tmpfs", str(folder)],
        capture_output=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


def index_and_tell(folder: Path, photos: Path, bundle: Path, told: Connection) -> None:
    try:
        told.send(index(folder, photos, bundle))
    except Exception as problem:
        told.send(problem)


def outcome(folder: Path, photos: Path, bundle: Path) -> object:
    """Return the report or the error of an update in a separate process.

    A write into a mapped file on a full disk kills; then nothing is told.
    """
    ours, theirs = processes().Pipe(duplex=False)
    process = processes().Process(target=index_and_tell, args=(folder, photos, bundle, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        pytest.fail(f"the update was killed: {process.exitcode}")


def test_a_full_disk_stops_an_update_and_free_space_lets_it_resume(
    tmp_path: Path, small_disk: Path
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", dim=1024)
    photos = tmp_path / "photos"
    write_photos(photos, 14)
    (photos / "junk.jpg").write_bytes(b"junk")
    index(tmp_path / "expected.sbtk", photos, bundle)
    folder = small_disk / "g.sbtk"
    stopped_at: set[str] = set()
    for kib in SIZES_KIB:
        resize(small_disk, kib)
        problem = outcome(folder, photos, bundle)
        if isinstance(problem, IndexReport):
            break
        assert isinstance(problem, DiskFull), problem
        assert "bytes free" in problem.found
        assert "the same command again" in problem.next_step
        assert not (folder / "manifest.json").exists()
        stopped_at.add(problem.found.split()[5].removeprefix(str(folder)))
    resize(small_disk, 2 * SIZES_KIB[-1])
    assert {"/catalogue.sqlite", "/codes-1/rotation.npz"} <= stopped_at
    index(folder, photos, bundle)
    assert contents(folder) == contents(tmp_path / "expected.sbtk")
    assert verify_gallery(folder).problems == ()


def test_a_full_disk_does_not_change_the_published_gallery(
    tmp_path: Path, small_disk: Path
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", dim=64)
    photos, folder = tmp_path / "photos", small_disk / "g.sbtk"
    resize(small_disk, 4096)
    write_photos(photos, 6)
    index(folder, photos, bundle)
    before = (folder / "manifest.json").read_bytes()
    write_photos(photos, 30)
    filler = small_disk / "filler"
    free_bytes = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler.write_bytes(b"x" * (free_bytes - (48 << 10)))
    problem = outcome(folder, photos, bundle)
    assert isinstance(problem, DiskFull), problem
    assert (folder / "manifest.json").read_bytes() == before
    with Gallery.open(folder) as gallery:
        assert gallery.count == 6
        assert len(gallery.search(gallery._vectors.read(gallery._view.rows())[0][0], 6)) == 6
    filler.unlink()
    index(folder, photos, bundle)
    assert verify_gallery(folder).live == 30
    assert verify_gallery(folder).problems == ()
