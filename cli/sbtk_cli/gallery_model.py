"""Which model goes with a gallery: the one that was asked for, or else the one that made it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sbtk_runtime.errors import ModelMismatch
from sbtk_runtime.names import printable_name

if TYPE_CHECKING:
    from sbtk_runtime.bundle import Bundle


def bundle_for_gallery(model: str | None, folder: Path, made_by: str) -> Bundle:
    """Returns the bundle that `model` names, or without one the bundle with the id `made_by`.

    A gallery may have been made by another model than the one that is the default now.

    Raises:
        BadModel: there is no bundle of that name.
        ModelMismatch: no bundle has that id among those that `sbtk models` lists.
    """
    from sbtk_runtime.bundle import Bundle, list_bundles

    if model is not None:
        return Bundle.open(model)
    bundles = list_bundles()
    for bundle in bundles:
        if bundle.manifest.model_id == made_by:
            return bundle
    here = ", ".join(bundle.manifest.model_id for bundle in bundles) or "none"
    raise ModelMismatch(
        f"{printable_name(folder)} was made by {made_by}, which is not among the models here "
        f"({here})",
        f"the folder of {made_by}, wherever it is",
        f"name it: --model FOLDER; or index the photos again, with a model that is here: "
        f"sbtk index PHOTOS --gallery {shlex.quote(_other_name(folder))} --model NAME",
    )


def _other_name(folder: Path) -> str:
    other = folder.with_name(f"{folder.name.removesuffix('.sbtk')}-2.sbtk")
    return printable_name(other)
