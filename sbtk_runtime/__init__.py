"""The runtime of sbtk: embeds sketches and photos and searches galleries, without torch.

`index` makes a gallery of photos, an `Embedder` runs the model, and `Gallery.query` finds photos:

    from sbtk_runtime import Embedder, Gallery, index

    with Embedder() as embedder:
        index("photos", "gallery.sbtk", embedder)
        with Gallery.open("gallery.sbtk") as gallery:
            hits = gallery.query("sketch.png", embedder)

The public names are imported on first use, so that importing one leaf module stays cheap.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

try:
    import fcntl as _fcntl  # noqa: F401
except ImportError as problem:
    # Windows has neither the locks of galleries nor a way to open files below an open folder.
    raise ImportError(
        "sbtk runs on Linux and macOS; on Windows, install and run it inside WSL "
        "(https://learn.microsoft.com/windows/wsl/install)",
        name="fcntl",
    ) from problem

if TYPE_CHECKING:
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.embedding.embedder import Embedder
    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.errors import SbtkError
    from sbtk_runtime.evaluation.metrics import evaluate_by
    from sbtk_runtime.evaluation.protocol import (
        CodeRule,
        Labelled,
        Measure,
        Protocol,
        draw_seen,
        photo_queries,
    )
    from sbtk_runtime.gallery.catalogue import Photo
    from sbtk_runtime.gallery.gallery import Gallery
    from sbtk_runtime.gallery.index import add_photos, index, remove_photos
    from sbtk_runtime.gallery.queries import Hit
    from sbtk_runtime.gallery.remote_gallery import RemoteGallery
    from sbtk_runtime.gallery.update import IndexReport
    from sbtk_runtime.preprocess import ImageInput

# ONNX Runtime reads this when it is imported, by whichever package; without it, each session
# leaves an id in the user's cache folder and sends telemetry to Microsoft.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Bundle",
    "CodeRule",
    "Embedder",
    "EngineOptions",
    "Gallery",
    "Hit",
    "ImageInput",
    "IndexReport",
    "Labelled",
    "Measure",
    "Photo",
    "Protocol",
    "RemoteGallery",
    "SbtkError",
    "add_photos",
    "draw_seen",
    "evaluate_by",
    "index",
    "photo_queries",
    "remove_photos",
]

_HOME = {
    "Bundle": "sbtk_runtime.bundle",
    "CodeRule": "sbtk_runtime.evaluation.protocol",
    "Embedder": "sbtk_runtime.embedding.embedder",
    "EngineOptions": "sbtk_runtime.engines.base",
    "Gallery": "sbtk_runtime.gallery.gallery",
    "Hit": "sbtk_runtime.gallery.queries",
    "ImageInput": "sbtk_runtime.preprocess",
    "IndexReport": "sbtk_runtime.gallery.update",
    "Labelled": "sbtk_runtime.evaluation.protocol",
    "Measure": "sbtk_runtime.evaluation.protocol",
    "Photo": "sbtk_runtime.gallery.catalogue",
    "Protocol": "sbtk_runtime.evaluation.protocol",
    "RemoteGallery": "sbtk_runtime.gallery.remote_gallery",
    "SbtkError": "sbtk_runtime.errors",
    "add_photos": "sbtk_runtime.gallery.index",
    "draw_seen": "sbtk_runtime.evaluation.protocol",
    "evaluate_by": "sbtk_runtime.evaluation.metrics",
    "index": "sbtk_runtime.gallery.index",
    "photo_queries": "sbtk_runtime.evaluation.protocol",
    "remove_photos": "sbtk_runtime.gallery.index",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sbtk_runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
