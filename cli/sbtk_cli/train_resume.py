"""`sbtk train --resume`: options that say otherwise than the run are refused, and both named."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbtk_runtime.errors import BadConfig

if TYPE_CHECKING:
    from sbtk_train.config import TrainConfig

#: Where and how a run is made does not change what comes out of it.
_FREE = ("workers", "threads", "device", "checkpoint_minutes", "feature_folder")


def require_same(
    config: TrainConfig, data: Path | None, given: Iterable[str], values: dict[str, Any]
) -> None:
    """Refuses options beside --resume that say otherwise than the run's own configuration.

    Args:
        config: of the run.
        data: the folder, if it was given on the command line.
        given: names of the options that were given on the command line.
        values: the options' values by name.

    Raises:
        BadConfig: names the first that differs, with both values.
    """
    differing: list[tuple[str, object, object]] = []
    if data is not None and data.resolve() != Path(config.data).resolve():
        differing.append(("DATA", data, config.data))
    own = {**vars(config), **vars(config.recipe), "recipe": config.recipe.name}
    for name in given:
        found, expected = values[name], own.get(name)
        if name in _FREE:
            continue
        is_path = name in ("weights", "teacher", "classes")
        if is_path or (name == "freeze_until" and found == "none"):
            found = "" if found in (None, "none") else str(found)
        if found != expected and not (name == "weights" and found == "imagenet"):
            differing.append(("--" + _spelling(name), found, expected))
    if differing:
        option, found, expected = differing[0]
        raise BadConfig(
            f"{option} {found}, and the run was started with {expected}",
            "the run's own configuration, which --resume takes",
            "leave the option out, or start a new run without --resume",
        )


def _spelling(name: str) -> str:
    return {"train_size_px": "size"}.get(name, name.replace("_", "-"))
