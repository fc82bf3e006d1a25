"""Files are whole or absent, whatever interrupts their writing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbtk_runtime.errors import BadGallery, BadModel, DiskFull, GalleryBusy, SbtkError
from sbtk_runtime.files import (
    MAX_JSON_BYTES,
    WriterLock,
    atomic_path,
    disk_full_explained,
    read_json_object,
    read_refused,
    remove_stale_temporaries,
    sha256_of_file,
    write_atomically,
    write_error,
    write_json_atomically,
)

SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sha256_equals_the_published_value(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "abc") == SHA256_OF_ABC


def test_a_write_replaces_the_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "value"
    write_atomically(path, b"a long first content")
    write_atomically(path, b"short")
    assert path.read_bytes() == b"short"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "value"
    write_atomically(path, b"old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_write_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        write_atomically(tmp_path / "file" / "value", b"new")
    assert caught.value.filename == str(tmp_path / "file" / "value")


def test_a_killed_write_keeps_the_old_file_and_its_temporary_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "value"
    write_atomically(path, b"old")
    script = (
        "import pathlib, sys, time\n"
        "from sbtk_runtime.files import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half of the n')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with _python(script, str(path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        # While its process lives, a temporary is not stale.
        assert remove_stale_temporaries(tmp_path) == []
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert path.read_bytes() == b"old"
    assert len(remove_stale_temporaries(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_only_our_own_temporaries_of_dead_processes_are_removed(tmp_path: Path) -> None:
    keep = ["value.tmp-1", ".value.tmp-", ".value.tmp-x", f".value.tmp-{os.getppid()}"]
    stale = [".value.tmp-999999999", ".value.tmp-99999999999999999999999"]
    stale += [".value.tmp-999999999-wal", ".value.tmp-999999999-shm"]
    for name in (*keep, *stale):
        (tmp_path / name).touch()
    (tmp_path / ".folder.tmp-999999999").mkdir()
    removed = remove_stale_temporaries(tmp_path)
    assert sorted(path.name for path in removed) == sorted(stale)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*keep, ".folder.tmp-999999999"]
    )


def test_json_round_trip_keeps_names_that_are_not_utf8(tmp_path: Path) -> None:
    value = {"path": os.fsdecode(b"caf\xe9 \xf0\x9f\x90\xb1"), "umlaut": "ü", "n": 1.5}
    write_json_atomically(tmp_path / "value.json", value)
    assert read_json_object(tmp_path / "value.json", BadModel) == value
    assert "ü" in (tmp_path / "value.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1, 2]", "contains a JSON list"),
        (b"null", "contains a JSON NoneType"),
        (b'{"a": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": "' + b"x" * MAX_JSON_BYTES + b'"}', "larger than"),
    ],
)
def test_hostile_json_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(BadGallery, match=complaint) as caught:
        read_json_object(path, BadGallery)
    assert "value.json" in caught.value.found


def test_a_sparse_gigabyte_of_json_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(BadModel, match="larger than"):
        read_json_object(path, BadModel)


def test_json_is_read_only_from_regular_files(tmp_path: Path) -> None:
    (tmp_path / "value.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "link.json").symlink_to("value.json")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "fifo.json")
    for name in ("link.json", "folder.json", "fifo.json", "absent.json"):
        with pytest.raises(BadModel, match=name):
            read_json_object(tmp_path / name, BadModel)


def test_disk_full_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DiskFull) as caught, disk_full_explained(tmp_path / "value"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "bytes free" in caught.value.found
    with pytest.raises(PermissionError), disk_full_explained(tmp_path / "value"):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_explained() -> None:
    with (
        pytest.raises(DiskFull, match="/dev/full"),
        disk_full_explained(Path("/dev/full")),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "sbtk-test", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    path = small_disk / "value"
    write_atomically(path, b"old")
    with pytest.raises(DiskFull, match="no space left"):
        write_atomically(path, bytes(1 << 20))
    assert path.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_the_error_of_a_second_writer_names_the_first(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from sbtk_runtime.files import WriterLock\n"
        "with WriterLock(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    lock = tmp_path / ".lock"
    with _python(script, str(lock)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(GalleryBusy, match=rf"PID {process.pid}, since 20"), WriterLock(lock):
            pass
        process.kill()
        process.wait(timeout=30)
    # The kernel has released the lock of the dead; its file does not matter.
    with WriterLock(lock):
        assert f"PID {os.getpid()}" in lock.read_text()


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a file system that refuses everybody")
def test_a_folder_that_cannot_be_locked_is_told_with_what_to_do() -> None:
    with (
        pytest.raises(SbtkError, match="/sys cannot be written") as caught,
        WriterLock(Path("/sys/.lock")),
    ):
        pass
    assert "file system with locks" in caught.value.expected
    assert "then run the same command again" in caught.value.next_step


def test_what_is_in_the_place_of_a_file_is_to_be_put_aside(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.mkdir()
    with pytest.raises(SbtkError, match="Is a directory") as caught:
        WriterLock(lock).__enter__()
    assert f"put {lock} aside" in caught.value.next_step
    with pytest.raises(IsADirectoryError) as refused:
        write_atomically(lock, b"")
    assert f"put {lock} aside" in write_error(lock, refused.value).next_step
    assert f"put {lock} aside" in read_refused(lock, refused.value)[2]


def test_a_lock_is_released_after_use_and_after_an_error(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with pytest.raises(RuntimeError), WriterLock(lock):
        raise RuntimeError
    with WriterLock(lock), pytest.raises(GalleryBusy), WriterLock(lock):
        pass
    with WriterLock(lock):
        pass


def test_the_name_of_a_lock_holder_is_printed_without_escapes(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with WriterLock(lock):
        lock.write_bytes(b"PID 1\x1b[2J\xff")
        with pytest.raises(GalleryBusy) as caught, WriterLock(lock):
            pass
    assert "\x1b" not in str(caught.value)


def test_the_error_of_a_lock_in_a_missing_folder_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(SbtkError, match="absent cannot be written"):
        WriterLock(tmp_path / "absent" / ".lock").__enter__()


def _python(script: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
