"""What the engines are measured on: pictures to embed, and something to search."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sbtk_cli.options import DEFAULT_GALLERY, existing_gallery
from sbtk_runtime.bench.latency import Pictures
from sbtk_runtime.bench.stages import Embeddings, Search
from sbtk_runtime.errors import BadData, BadImage
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.generated_inputs import (
    PICTURES_NAMED,
    clustered_named,
    clustered_vectors,
    generated_photos,
    generated_sketches,
)
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.manifest import MANIFEST_NAME, BundleManifest
from sbtk_runtime.preprocess import Kind, prepare
from sbtk_train.data import read_dataset

_PICTURES = 32
_SYNTHETIC_ROWS = 10_000
_HITS = 10


def pictures_of(data: Path | None) -> Pictures:
    """Returns sketches and photos of a data set, evenly taken from it, or generated ones."""
    if data is None:
        return Pictures(generated_sketches(8), generated_photos(8), PICTURES_NAMED)
    images = read_dataset(data)
    sketches, photos = _readable(images.sketch_files, "sketch"), _readable(images.photos, "photo")
    if not sketches or not photos:
        raise BadData(f"{data} lacks readable sketches or photos", "at least one of each")
    named = f"{len(sketches)} sketches and {len(photos)} photos of {data.name}"
    return Pictures(sketches, photos, named)


@contextlib.contextmanager
def searched(folder: Path | None, manifest: BundleManifest) -> Iterator[tuple[Search, str]]:
    """Yields the last stage of a query, and what it searches in words.

    Args:
        folder: a gallery; `None` is the default one if it is there and of this model, else exact
            search over synthetic vectors.
        manifest: of the model.
    """
    gallery = _gallery(folder, manifest)
    if gallery is not None:
        with gallery:
            named = f"the {_HITS} best of {gallery.count:,} photos in a gallery"
            yield lambda row: gallery.search(row, _HITS), named
        return
    vectors = clustered_vectors(_SYNTHETIC_ROWS, manifest.dim)

    def search(row: Embeddings) -> object:
        scores = vectors @ row
        best = np.argpartition(scores, -_HITS)[-_HITS:]
        return best[np.argsort(-scores[best])]

    named = clustered_named(_SYNTHETIC_ROWS, manifest.dim, seed=0)
    yield search, f"the {_HITS} best of {named}, exact"


def _readable(paths: tuple[Path, ...], kind: Kind) -> list[bytes]:
    """Returns the contents of up to `_PICTURES` files, evenly taken, without those that are bad."""
    contents = []
    for path in paths[:: max(1, len(paths) // _PICTURES)][:_PICTURES]:
        with contextlib.suppress(BadImage):
            content = read_image_bytes(path)
            prepare(content, kind)
            contents.append(content)
    return contents


def _gallery(folder: Path | None, manifest: BundleManifest) -> Gallery | None:
    if folder is not None:
        return Gallery.open(existing_gallery(folder))
    if not (DEFAULT_GALLERY / MANIFEST_NAME).is_file():
        return None
    gallery = Gallery.open(DEFAULT_GALLERY)
    if gallery.manifest.model_id == manifest.model_id:
        return gallery
    gallery.close()
    return None
