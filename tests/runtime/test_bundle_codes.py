"""A bundle's ITQs are checked like its models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.errors import BadModel
from sbtk_runtime.files import sha256_of_file
from sbtk_runtime.manifest import FileRecord, read_bundle_manifest
from tests.tiny_gallery import tiny_code_bundle, tiny_itq


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_code_bundle(tmp_path / "coded", 16, 8)


def put(folder: Path, name: str, content: bytes) -> None:
    """Put a file into a bundle that its manifest vouches for."""
    path = folder / name
    path.write_bytes(content)
    manifest = read_bundle_manifest(folder)
    record = FileRecord(sha256_of_file(path), path.stat().st_size)
    replace(manifest, files=manifest.files | {name: record}).write(folder)


def test_code_lengths_are_sorted_and_their_files_read(folder: Path) -> None:
    bundle = Bundle.open(folder)
    bundle.verify()
    assert bundle.bits == (8, 16)
    assert bundle.itq(16).to_bytes() == (folder / "itq16.npz").read_bytes()


def test_a_changed_file_is_refused(folder: Path) -> None:
    data = bytearray((folder / "itq16.npz").read_bytes())
    data[200] ^= 1
    (folder / "itq16.npz").write_bytes(data)
    for ask in (Bundle.open(folder).verify, lambda: Bundle.open(folder).itq(16)):
        with pytest.raises(BadModel, match=r"itq16\.npz is damaged or was changed"):
            ask()
    assert Bundle.open(folder).itq(8).bits == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiny_itq(16, 8).to_bytes(), "makes 8 bits of 16 dimensions"),
        (tiny_itq(32, 16).to_bytes(), "makes 16 bits of 32 dimensions"),
        (b"no zip", "cannot be read"),
    ],
)
def test_a_file_of_something_else_is_refused(folder: Path, content: bytes, message: str) -> None:
    put(folder, "itq16.npz", content)
    with pytest.raises(BadModel, match=message):
        Bundle.open(folder).itq(16)
    with pytest.raises(BadModel, match=message):
        Bundle.open(folder).verify()


def test_a_file_without_a_recorded_hash_makes_no_codes(folder: Path) -> None:
    (folder / "itq24.npz").write_bytes(tiny_itq(16, 8).to_bytes())
    bundle = Bundle.open(folder)
    assert bundle.bits == (8, 16)
    with pytest.raises(BadModel, match=r"itq24\.npz is not in the bundle's manifest"):
        bundle.verify()


@pytest.mark.parametrize("name", ["itq.npz", "itq08.npz", "itq8.NPZ", "xitq8.npz", "itq8.npz.bak"])
def test_other_file_names_are_not_code_lengths(tmp_path: Path, name: str) -> None:
    folder = tiny_code_bundle(tmp_path / "coded", 16)
    put(folder, name, b"something")
    assert Bundle.open(folder).bits == (16,)
