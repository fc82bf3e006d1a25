"""The runtime of sbtk: embeds sketches and photos and searches galleries, without torch.

The public names are resolved on first use, so that importing one leaf module stays cheap.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

try:
    import fcntl as _fcntl  # noqa: F401
except ImportError as problem:
    # Locks on galleries and opening files below an open folder exist on no Windows.
    raise ImportError(
        "sbtk runs on Linux and macOS; on Windows, install and run it inside WSL "
        "(https://learn.microsoft.com/windows/wsl/install)",
        name="fcntl",
    ) from problem

if TYPE_CHECKING:
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.embedding.embedder import Embedder
    from sbtk_runtime.errors import SbtkError
    from sbtk_runtime.evaluation.evaluation import Labelled, evaluate_by, photo_queries
    from sbtk_runtime.evaluation.protocol import CodeRule, Measure, Protocol, draw_seen
    from sbtk_runtime.gallery.gallery import Gallery, Hit

# ONNX Runtime reads this when it is imported, by whichever of our packages; without it each session
# leaves an id in the user's cache folder and reports to Microsoft over the network.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Bundle",
    "CodeRule",
    "Embedder",
    "Gallery",
    "Hit",
    "Labelled",
    "Measure",
    "Protocol",
    "SbtkError",
    "draw_seen",
    "evaluate_by",
    "photo_queries",
]

_HOME = {
    "Bundle": "sbtk_runtime.bundle",
    "CodeRule": "sbtk_runtime.evaluation.protocol",
    "Embedder": "sbtk_runtime.embedding.embedder",
    "Gallery": "sbtk_runtime.gallery.gallery",
    "Hit": "sbtk_runtime.gallery.gallery",
    "Labelled": "sbtk_runtime.evaluation.evaluation",
    "Measure": "sbtk_runtime.evaluation.protocol",
    "Protocol": "sbtk_runtime.evaluation.protocol",
    "SbtkError": "sbtk_runtime.errors",
    "draw_seen": "sbtk_runtime.evaluation.protocol",
    "evaluate_by": "sbtk_runtime.evaluation.evaluation",
    "photo_queries": "sbtk_runtime.evaluation.evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sbtk_runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
