"""What a gallery keeps and what makes it: settled before its first photo, the same ever after."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embed import Embedder
from sbtk_runtime.errors import BadGallery
from sbtk_runtime.gallery.catalogue import Origin
from sbtk_runtime.gallery.catalogue_database import CATALOGUE_NAME, damaged
from sbtk_runtime.gallery.catalogue_writer import Catalogue
from sbtk_runtime.gallery.folder import check_model
from sbtk_runtime.itq import Itq
from sbtk_runtime.manifest import GalleryManifest
from sbtk_runtime.names import printable_name
from sbtk_runtime.preprocess import PREPROCESSING


def claimed(
    folder: Path,
    catalogue: Catalogue,
    embedder: Embedder,
    bits: int | None,
    roots: Sequence[str],
    note: Callable[[str], None],
) -> tuple[Origin, Itq | None]:
    """Returns what makes a gallery's embeddings, which is the embedder, and codes of them.

    Args:
        folder: the gallery's.
        catalogue: the gallery's; claimed if it has no photo yet.
        embedder: of whoever writes.
        bits: length of the codes to keep; `None` for embeddings, or what the gallery has.
        roots: folders and files of which the gallery is made.
        note: told, in a sentence, what is worth knowing.

    Raises:
        BadModel: the gallery is new, and the embedder's bundle makes no such codes.
        BadGallery: the gallery keeps something else.
        ModelMismatch: another model made it.
    """
    precision = embedder.engine.info.precision
    origin = catalogue.origin()
    if origin is None or not catalogue.committed_rows():
        itq = None if bits is None else embedder.bundle.itq(bits)
        ours = Origin(embedder.model_id, precision, embedder.dim, PREPROCESSING, bits)
        catalogue.claim(ours, itq)
        return ours, itq
    photos = " ".join(shlex.quote(printable_name(root)) for root in roots)
    check_model(folder, origin.model_id, origin.preprocessing, embedder.bundle, photos)
    check_bits(folder, origin, bits, photos)
    if origin.dim != embedder.dim:
        # By another width the shards would be cut in the wrong places.
        raise damaged(catalogue.path, f"embeddings of {origin.dim} numbers by {origin.model_id}")
    if origin.precision != precision:
        note(
            f"the gallery was made at {origin.precision}; new photos are embedded at "
            f"{precision}, which finds nearly the same"
        )
    return origin, None if origin.bits is None else catalogue.itq()


def require_codes(folder: Path, bundle: Bundle, bits: int | None) -> None:
    """Makes sure, before a new gallery's folder is made, that the bundle can fill it.

    Raises:
        BadModel: the bundle makes no codes of so many bits.
    """
    if bits is not None and not (folder / CATALOGUE_NAME).exists():
        bundle.itq(bits)


def check_bits(
    folder: Path, kept: GalleryManifest | Origin, asked: int | None, photos: str = "PHOTOS"
) -> None:
    """Makes sure that a gallery keeps what is asked for; `None` asks for what it keeps.

    Raises:
        BadGallery: it keeps something else; names both, and the command that makes another
            gallery of `photos`.
    """
    if asked in (None, kept.bits):
        return
    what = "embeddings" if kept.bits is None else f"{kept.bits}-bit codes"
    other = folder.with_name(f"{folder.name.removesuffix('.sbtk')}-{asked}bit.sbtk")
    raise BadGallery(
        f"{printable_name(folder)} keeps {what}, not {asked}-bit codes",
        "the same for all photos of a gallery, as it was made",
        f"sbtk index {photos} --bits {asked} --gallery {shlex.quote(printable_name(other))}",
    )
