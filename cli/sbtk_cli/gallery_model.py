"""Which model goes with a gallery: the one that was asked for, or else the one that made it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sbtk_runtime.errors import BadModel, ModelMismatch
from sbtk_runtime.names import printable_name

if TYPE_CHECKING:
    from sbtk_runtime.bundle import Bundle


def bundle_for_gallery(model: str | None, folder: Path, made_by: str) -> Bundle:
    """Returns the bundle that `model` names, or without one the bundle with the id `made_by`.

    A gallery may have been made by another model than the one that is the default now. If there
    is no bundle with that id it is the default all the same, and whoever uses it will complain.

    Raises:
        BadModel: there is no bundle of that name.
        ModelMismatch: there is no bundle at all.
    """
    from sbtk_runtime.bundle import Bundle, list_bundles

    if model is not None:
        return Bundle.open(model)
    for bundle in list_bundles():
        if bundle.manifest.model_id == made_by:
            return bundle
    try:
        return Bundle.open()
    except BadModel as problem:
        raise ModelMismatch(
            f"{printable_name(folder)} was made by {made_by}, and no such model is here",
            f"--model BUNDLE with the folder of {made_by}",
            "sbtk models lists bundles",
        ) from problem
