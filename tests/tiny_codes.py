"""Binary codes for tests: a tiny bundle that makes them, and galleries of given codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sbtk_runtime.binary_codes import Codes, Itq, fit_itq
from sbtk_runtime.bundle import itq_name
from sbtk_runtime.files import sha256_of_file
from sbtk_runtime.gallery.catalogue import Embedding, Origin
from sbtk_runtime.gallery.folder import open_rows
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import FileRecord, GalleryManifest, read_bundle_manifest
from sbtk_runtime.preprocess import PREPROCESSING
from tests.tiny import tiny_bundle
from tests.tiny_gallery import make_old, photo_path, unit_rows


def tiny_itq(dim: int, bits: int, seed: int = 0) -> Itq:
    """Return an ITQ of random rows."""
    return fit_itq(unit_rows(300, dim, seed), bits, iterations=5)


def tiny_code_bundle(folder: Path, *bits: int, dim: int = 16, itq_seed: int = 0) -> Path:
    """Return the tiny bundle with an ITQ for each of `bits`; other seeds give other ITQs."""
    tiny_bundle(folder, dim)
    manifest = read_bundle_manifest(folder)
    files = dict(manifest.files)
    for length in bits:
        path = folder / itq_name(length)
        path.write_bytes(tiny_itq(dim, length, itq_seed).to_bytes())
        files[path.name] = FileRecord(sha256_of_file(path), path.stat().st_size)
    replace(manifest, files=files).write(folder)
    return folder


def code_gallery_of(
    folder: Path,
    codes: Codes,
    itq: Itq,
    *,
    commit_every: int = 25,
    is_old: bool = False,
    changed: int = 0,
) -> GalleryManifest:
    """Make a binary gallery of generation 1 that holds the given codes; ids start with 1.

    The first `changed` photos have other bytes than in a gallery in which none are.
    """
    folder.mkdir()
    origin = Origin("made-up@0123456789ab", "fp32", itq.dim, PREPROCESSING, itq.bits)
    with Catalogue(folder, 1) as catalogue:
        catalogue.claim(origin, itq)
        shards = open_rows(folder, itq.dim, itq.bits)
        batches = [
            batch
            for first in range(0, len(codes), commit_every)
            for batch in shards.append_bytes(first, codes[first : first + commit_every])
        ]
        contents = [("01" if i < changed else "00") * 32 for i in range(len(codes))]
        photos = [
            Embedding(photo_path(i), 1000 + i, i, sha256, i) for i, sha256 in enumerate(contents)
        ]
        catalogue.commit(photos, [], batches)
        snapshot = None if is_old else catalogue.write_snapshot()
    manifest = GalleryManifest(
        generation=1,
        model_id=origin.model_id,
        precision=origin.precision,
        dim=origin.dim,
        preprocessing=PREPROCESSING,
        live=len(codes),
        bits=itq.bits,
        snapshot=snapshot,
    )
    manifest.write(folder)
    if is_old:
        make_old(folder)
    return manifest
