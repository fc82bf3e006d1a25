"""The folder of a gallery: its files, its origin, and its obsolete files."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import no_notify
from sbtk_runtime.errors import BadData, BadGallery, GalleryBusy, ModelMismatch
from sbtk_runtime.files import (
    atomic_path,
    disk_full_explained,
    is_as_written,
    printable_name,
    sha256_of_file,
    write_error,
)
from sbtk_runtime.gallery.catalogue import CatalogueView, Origin
from sbtk_runtime.gallery.row_check import RowCheck
from sbtk_runtime.gallery.rows import CodeShards, Shards, Vectors
from sbtk_runtime.gallery.schema import CATALOGUE_NAME, damaged
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import (
    MANIFEST_NAME,
    CodesRecord,
    GalleryManifest,
    PhotoShard,
    read_gallery_manifest,
)

VECTORS_NAME = "vectors"
LOCK_NAME = ".lock"
#: Folders of sign codes: `codes-<generation>`.
CODES_PREFIX = "codes-"
FAILURES_NAME = "failures.jsonl"

_ATTEMPTS = 5


def published_manifest(folder: Path) -> GalleryManifest:
    """Return the manifest of the gallery in `folder`.

    Raises:
        BadGallery: there is none, or it cannot be used; the message says how to rebuild it from the
            catalogue.
    """
    if not (folder / MANIFEST_NAME).exists():
        raise BadGallery(
            f"there is no gallery in {printable_name(folder)}",
            "one that 'sbtk index' has made",
            f"sbtk index PHOTOS --gallery {shlex.quote(printable_name(folder))}",
        )
    try:
        return read_gallery_manifest(folder)
    except BadGallery as problem:
        if problem.next_step:
            raise
        path = shlex.quote(printable_name(folder / MANIFEST_NAME))
        raise BadGallery(
            problem.found,
            problem.expected,
            f"rm {path}, then 'sbtk index' on your photos: it is rebuilt from the catalogue",
        ) from problem


def check_model(
    folder: Path,
    made_by: str,
    preprocessing: str,
    bundle: Bundle,
    photos: str = "PHOTOS",
) -> None:
    """Check that a bundle's model and preprocessing made the gallery.

    Raises:
        ModelMismatch: they did not; the message names both, and the command that indexes `photos`
            with the bundle.
    """
    model_id, name = bundle.manifest.model_id, bundle.manifest.name
    if model_id == made_by and preprocessing == bundle.manifest.preprocessing:
        return
    other = folder.with_name(f"{folder.name.removesuffix('.sbtk')}-{name}.sbtk")
    if model_id != made_by:
        ours, theirs = f"the model {model_id}", made_by
    else:
        ours = f"preprocessing {bundle.manifest.preprocessing}"
        theirs = f"preprocessing {preprocessing}"
    raise ModelMismatch(
        f"{ours} did not make {printable_name(folder)}",
        f"{theirs}, which made it (embeddings of two models cannot be compared)",
        f"sbtk index {photos} --gallery {shlex.quote(printable_name(other))} "
        f"--model {shlex.quote(printable_name(bundle.folder))}",
    )


def open_rows(folder: Path, dim: int, bits: int | None) -> Vectors | CodeShards:
    """Return the rows of a gallery: embeddings, or codes of `bits` bits."""
    where = folder / VECTORS_NAME
    return Vectors(where, dim) if bits is None else CodeShards(where, bits)


def kept_text(dim: int, bits: int | None) -> str:
    """Return a description of a gallery's rows: "512 numbers a photo", "64 bits of ..."."""
    numbers = f"{dim} numbers a photo"
    return numbers if bits is None else f"{bits} bits of {numbers}"


def path_fields(path: bytes) -> dict[str, str]:
    """Return `{"path": ...}`, or `{"path_bytes": ...}` in base64 when it is not UTF-8."""
    try:
        return {"path": path.decode("utf-8")}
    except UnicodeDecodeError:
        return {"path_bytes": base64.b64encode(path).decode("ascii")}


def make_folder(folder: Path) -> None:
    """Create the folder of a gallery, or check that an existing folder is a gallery.

    Raises:
        BadGallery: it is a file, contains other files, or its catalogue is missing.
    """
    if folder.exists() and not folder.is_dir():
        raise BadGallery(
            f"{printable_name(folder)} is a file",
            "a gallery, an empty folder, or one that does not exist",
            "name another folder: --gallery gallery.sbtk",
        )
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    # SQLite would take a shorter file for a new catalogue.
    is_there = CATALOGUE_NAME in names and (folder / CATALOGUE_NAME).stat().st_size >= 100
    if MANIFEST_NAME in names and not is_there:
        raise BadGallery(
            f"{printable_name(folder)} has lost its {CATALOGUE_NAME}",
            "a gallery",
            "put the folder aside and run the same command again",
        )
    if CATALOGUE_NAME not in names and any(not name.startswith(".") for name in names):
        raise BadGallery(
            f"{printable_name(folder)} holds other files",
            "a gallery, an empty folder, or one that does not exist",
            "name another folder: --gallery gallery.sbtk",
        )


def vacuum(
    folder: Path, catalogue: Catalogue, vectors: Shards, published: GalleryManifest | None
) -> None:
    """Remove files that neither the published generation nor the catalogue uses."""
    if published is not None:
        catalogue.purge(published.generation)
    vectors.cut(catalogue.committed_rows())
    vectors.remove_shards(set(vectors.shard_indices()) - catalogue.shards())
    kept = set()
    if published is not None:
        kept = {record.file for record in (published.graph, published.snapshot) if record}
    for pattern in ("graph-*.hnsw", "catalogue-*.sqlite"):
        for path in folder.glob(pattern):
            if path.name not in kept:
                _remove(path)
    _vacuum_codes(folder, None if published is None else published.codes)


def _vacuum_codes(folder: Path, record: CodesRecord | None) -> None:
    """Remove sign codes that a generation does not use; readers have theirs in memory."""
    for path in folder.glob(f"{CODES_PREFIX}*"):
        # Files in a folder that a link leads to may be others'.
        if record is None or path.name != record.folder or path.is_symlink() or not path.is_dir():
            _remove(path)
            continue
        for file in path.iterdir():
            if file.name not in record.files:
                _remove(file)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def has_snapshot(folder: Path, published: GalleryManifest | None) -> bool:
    """Return whether the published generation has an undamaged snapshot."""
    if published is None or published.snapshot is None:
        return False
    record = published.snapshot
    path = folder / record.file
    try:
        if is_as_written(path.lstat(), record.size_bytes, record.mtime_ns):
            return True
        return sha256_of_file(path) == record.sha256
    except OSError:
        return False


def open_view(
    folder: Path,
    manifest: GalleryManifest,
    note: Callable[[str], None],
    *,
    is_hashed: bool = False,
) -> CatalogueView:
    """Return the photos of the published generation.

    If the snapshot cannot be used, `note` is called with the reason, and the writer's catalogue is
    used instead. `is_hashed` is as in `CatalogueView`.

    Raises:
        BadGallery: neither can be used.
    """
    if manifest.snapshot is not None:
        try:
            return CatalogueView(
                folder, manifest.generation, manifest.snapshot, is_hashed=is_hashed
            )
        except BadGallery as problem:
            note(
                f"{problem.found}: reading {CATALOGUE_NAME} instead; "
                "'sbtk index' on your photos writes it again"
            )
    return CatalogueView(folder, manifest.generation)


def open_published(
    folder: Path, note: Callable[[str], None], *, is_hashed: bool = False
) -> tuple[GalleryManifest, CatalogueView]:
    """Return the newest published generation, and its photos as `open_view` does.

    Raises:
        BadGallery: there is none, or it is damaged and cannot be read.
    """
    while True:
        manifest = published_manifest(folder)
        notes: list[str] = []
        view = None
        try:
            view = open_view(folder, manifest, notes.append, is_hashed=is_hashed)
            if not notes or read_gallery_manifest(folder) == manifest:
                for text in notes:
                    note(text)
                return manifest, view
        except BadGallery:
            # A writer may have published another generation and removed this one's files.
            if read_gallery_manifest(folder) == manifest:
                raise
        if view is not None:
            view.close()


def roots_to_walk(folder: Path, roots: Sequence[Path]) -> list[str]:
    """Return the absolute paths of `roots`, without resolving links.

    A root may be absent if the gallery has photos below it: its disk may not be mounted, and the
    other roots can be updated.

    Raises:
        BadData: there are no roots, or one is absent and unknown.
    """
    # A `Path` raises an error below a folder that may not be read, and for names that are too long.
    absent = [root for root in roots if not os.path.exists(root)]  # noqa: PTH110
    known: list[Path] = []
    if absent and (folder / MANIFEST_NAME).exists():
        with closing(open_published(folder, no_notify)[1]) as view:
            known = [root for root in absent if view.knows(os.fsencode(os.path.abspath(root)))]  # noqa: PTH100
    there = [root for root in roots if root not in known]
    found = absolute_roots(there) if there or not known else []
    return list(dict.fromkeys([*found, *map(os.path.abspath, known)]))


def absolute_roots(roots: Sequence[Path]) -> list[str]:
    """Return the absolute paths of `roots` in the given order, each once, without resolving links.

    Raises:
        BadData: there are none, or one does not exist.
    """
    if not roots:
        raise BadData("no photos were named", "one or more folders or files")
    for root in roots:
        try:
            root.stat()
        except (OSError, ValueError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else str(problem)
            raise BadData(
                f"{printable_name(root)} cannot be read: {reason}", "a folder of photos"
            ) from problem
    return list(dict.fromkeys(os.path.abspath(root) for root in roots))  # noqa: PTH100


def write_failures(folder: Path, catalogue: Catalogue) -> None:
    """Write `failures.jsonl`, or remove it if there are no failures."""
    path = folder / FAILURES_NAME
    failures = catalogue.failures()
    first = next(failures, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for name, reason in itertools.chain((first,), failures):
            file.write(json.dumps(path_fields(name) | {"reason": reason}) + "\n")


def list_failures(folder: Path) -> list[dict[str, str]]:
    """Return the files of a gallery that could not be read, each with its path and `reason`.

    Raises:
        BadGallery: the list is damaged.
    """
    path = folder / FAILURES_NAME
    failures = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            failure = json.loads(line)
            if "path" not in failure:
                base64.b64decode(failure["path_bytes"])
            failures.append({**failure, "reason": str(failure["reason"])})
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, AttributeError, TypeError) as problem:
        raise BadGallery(
            f"{printable_name(path)} is damaged", "JSON lines", "sbtk index PHOTOS"
        ) from problem
    return failures


def partly_readable(folder: Path) -> list[dict[str, str]]:
    """Return the photos of a gallery that were read only in part, with their path and `reason`.

    The list is empty before the first generation is published.

    Raises:
        BadGallery: the gallery is damaged.
    """
    if not (folder / MANIFEST_NAME).exists():
        return []
    with contextlib.closing(open_published(folder, no_notify)[1]) as view:
        return [path_fields(path) | {"reason": why} for path, why in view.partly_readable()]


@contextlib.contextmanager
def translate_os_errors(folder: Path) -> Iterator[None]:
    """Translate the block's `OSError` into `DiskFull` or `BadGallery`."""
    try:
        with disk_full_explained(folder / MANIFEST_NAME):
            yield
    except BrokenPipeError:
        raise
    except OSError as problem:
        named = problem.filename if isinstance(problem.filename, str | bytes) else None
        path = folder if named is None else Path(os.fsdecode(named))
        if not path.is_relative_to(folder):
            raise BadGallery(f"{printable_name(path)}: {problem.strerror}") from problem
        raise write_error(path, problem, BadGallery) from problem


@dataclass(frozen=True)
class FolderCount:
    """An indexed folder or file, with the numbers of the gallery's photos below it.

    Attributes:
        path: absolute.
        photos: number of searchable photos.
        missing: number of missing photos, which are kept.
        exists: whether the path exists now.
    """

    path: bytes
    photos: int
    missing: int
    exists: bool


def folder_counts(folder: Path) -> list[FolderCount]:
    """Return the indexed folders of the gallery in `folder`, by path.

    A photo counts for the innermost of them. Photos below none, which an older sbtk indexed, count
    for their own folder.

    Raises:
        BadGallery: there is no gallery, or it is damaged.
    """
    with closing(open_published(folder, no_notify)[1]) as view:
        roots = set(view.roots())
        photos, missing = view.paths(), view.paths(missing=True)
        counts = Counter(_root_of(path, roots) for path in photos)
        missing_counts = Counter(_root_of(path, roots) for path in missing)
    return [
        FolderCount(path, counts[path], missing_counts[path], os.path.lexists(path))
        for path in sorted(roots | set(counts) | set(missing_counts))
    ]


def _root_of(path: bytes, roots: set[bytes]) -> bytes:
    above = roots_above(path, roots)
    return above[0] if above else path.rpartition(b"/")[0] or b"/"


def initialize_gallery(
    folder: Path,
    catalogue: Catalogue,
    embedder: Embedder,
    bits: int | None,
    roots: Sequence[str],
    shard: PhotoShard | None = None,
) -> tuple[Origin, Itq | None]:
    """Check that the embedder fits the gallery, and record it as the origin of a new one.

    Returns the gallery's origin, and the ITQ of a binary gallery.

    Only a gallery without photos needs the embedder's engine.

    Args:
        folder: the gallery's folder.
        catalogue: the gallery's catalogue, where the origin is recorded if it has no photos.
        embedder: the embedder of this update.
        bits: length of the codes; `None` for embeddings, or for what the gallery has.
        roots: the indexed folders and files.
        shard: the part of their photos to index; `None` for all, or for what the gallery has.

    Raises:
        BadModel: the gallery is new, and the embedder's bundle has no such codes.
        BadGallery: the gallery has other codes, or another shard.
        ModelMismatch: another model made it.
    """
    origin = catalogue.origin()
    photos = " ".join(shlex.quote(printable_name(root)) for root in roots)
    if origin is not None and (catalogue.committed_rows() or origin.shard is not None):
        check_shard(folder, origin, shard, photos)
        shard = origin.shard
    if origin is None or not catalogue.committed_rows():
        itq = None if bits is None else embedder.bundle.itq(bits)
        precision, preprocessing = embedder.engine.info.precision, embedder.bundle.preprocessing
        ours = Origin(embedder.model_id, precision, embedder.dim, preprocessing.name, bits, shard)
        catalogue.claim(ours, itq)
        return ours, itq
    check_model(folder, origin.model_id, origin.preprocessing, embedder.bundle, photos)
    check_bits(folder, origin, bits, photos)
    if origin.dim != embedder.dim:
        # With another width, rows would be read at wrong offsets.
        raise damaged(catalogue.path, f"embeddings of {origin.dim} numbers by {origin.model_id}")
    return origin, None if origin.bits is None else catalogue.itq()


def require_codes(folder: Path, bundle: Bundle, bits: int | None) -> None:
    """Check, before the folder of a new gallery is created, that the bundle has codes for it.

    Raises:
        BadModel: the bundle has no codes of `bits` bits.
    """
    if bits is not None and not (folder / CATALOGUE_NAME).exists():
        bundle.itq(bits)


def check_bits(
    folder: Path, kept: GalleryManifest | Origin, requested: int | None, photos: str = "PHOTOS"
) -> None:
    """Check that a gallery has codes of `requested` bits; `None` accepts any gallery.

    Raises:
        BadGallery: it does not; the message has the command that creates such a gallery of
            `photos`.
    """
    if requested in (None, kept.bits):
        return
    what = "embeddings" if kept.bits is None else f"{kept.bits}-bit codes"
    other = folder.with_name(f"{folder.name.removesuffix('.sbtk')}-{requested}bit.sbtk")
    raise BadGallery(
        f"{printable_name(folder)} keeps {what}, not {requested}-bit codes",
        "the same for all photos of a gallery, as it was made",
        f"sbtk index {photos} --bits {requested} --gallery {shlex.quote(printable_name(other))}",
    )


def check_shard(
    folder: Path,
    kept: GalleryManifest | Origin,
    requested: PhotoShard | None,
    photos: str = "PHOTOS",
) -> None:
    """Check that a gallery has the shard `requested`; `None` accepts any gallery.

    Raises:
        BadGallery: it has another shard, or all photos; the message has the command that creates
            such a gallery of `photos`.
    """
    if requested is None or requested == kept.shard:
        return
    what = "all photos" if kept.shard is None else f"shard {kept.shard}"
    stem = folder.name.removesuffix(".sbtk")
    other = folder.with_name(f"{stem}-{requested.index}-of-{requested.count}.sbtk")
    raise BadGallery(
        f"{printable_name(folder)} holds {what}, not shard {requested}",
        "one gallery for each shard",
        f"sbtk index {photos} --shard {requested} --gallery {shlex.quote(printable_name(other))}",
    )


def roots_above(path: bytes, roots: Collection[bytes]) -> list[bytes]:
    """Return those of the absolute `roots` that `path` is or lies below, innermost first."""
    found = []
    while True:
        if path in roots:
            found.append(path)
        parent = path.rpartition(b"/")[0] or b"/"
        if parent == path:
            return found
        path = parent


def outermost(roots: Iterable[bytes]) -> list[bytes]:
    """Return the absolute `roots` that lie below no other one, sorted; `/` if there are none."""
    known = frozenset(roots)
    return sorted({roots_above(root, known)[-1] for root in known}) or [b"/"]


def relative_path(path: bytes, root: bytes) -> bytes:
    """Return an absolute path relative to a root above it; a root that is a file has its name."""
    if path == root:
        return path.rpartition(b"/")[2]
    return path[len(root.rstrip(b"/")) + 1 :]


@dataclass(frozen=True)
class Generation:
    """An open generation.

    Attributes:
        manifest: of the generation.
        view: its photos.
        rows: their embeddings or codes.
        check: of their checksums.
    """

    manifest: GalleryManifest
    view: CatalogueView
    rows: Vectors | CodeShards
    check: RowCheck


@contextlib.contextmanager
def open_generation(folder: Path, note: Callable[[str], None]) -> Iterator[Generation]:
    """Yield the newest published generation, which later writes do not change.

    `note` is called with sentences about damaged files of the gallery.

    Raises:
        BadGallery: there is no gallery, or it is damaged and cannot be read.
        GalleryBusy: it changes faster than it can be opened.
    """
    for _ in range(_ATTEMPTS):
        manifest, view = open_published(folder, note)
        with closing(view), closing(open_rows(folder, manifest.dim, manifest.bits)) as rows:
            rows.hold()
            # A writer that published in between may have removed shards before they were held.
            if read_gallery_manifest(folder) == manifest:
                yield Generation(manifest, view, rows, RowCheck(view, rows))
                return
    raise GalleryBusy(
        f"{printable_name(folder)} changes faster than it can be read", "", "try again"
    )
