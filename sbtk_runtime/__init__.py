"""The runtime of sbtk: embeds sketches and photos and searches galleries, without torch.

The public names are resolved on first use, so that importing one leaf module stays cheap.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.embed import Embedder
    from sbtk_runtime.errors import SbtkError
    from sbtk_runtime.gallery import Gallery, Hit

# ONNX Runtime reads this when it is imported, by whichever of our packages; without it each session
# leaves an id in the user's cache folder and reports to Microsoft over the network.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Bundle", "Embedder", "Gallery", "Hit", "SbtkError"]

_HOME = {
    "Bundle": "sbtk_runtime.bundle",
    "Embedder": "sbtk_runtime.embed",
    "Gallery": "sbtk_runtime.gallery",
    "Hit": "sbtk_runtime.gallery",
    "SbtkError": "sbtk_runtime.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sbtk_runtime' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
