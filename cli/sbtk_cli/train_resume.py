"""`sbtk train --resume`: options that ask for another run are refused, and both named.

The data, and the files that the run was started with, may lie in another place now; the run's
hashes say whether they are the same. More epochs train longer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbtk_runtime.errors import BadConfig

if TYPE_CHECKING:
    from sbtk_train.config import TrainConfig


def resumed_config(
    config: TrainConfig, data: Path | None, given: Iterable[str], values: dict[str, Any]
) -> TrainConfig:
    """Returns the run's own configuration, with what the options say of how it is made.

    Args:
        config: of the run.
        data: the folder, if it was given on the command line.
        given: names of the options that were given on the command line.
        values: the options' values by name.

    Raises:
        BadConfig: names the first that differs, with both values.
    """
    from sbtk_cli.train_options import absolute
    from sbtk_train.config import FREE_FIELDS, PLACES

    free: dict[str, Any] = {}
    differing: list[str] = []
    if data is not None and data.resolve() != Path(config.data).resolve():
        free["data"] = absolute(data)
    own = {**vars(config), **vars(config.recipe), "recipe": config.recipe.name}
    for name in given:
        found = values[name]
        if name in FREE_FIELDS:
            free[name] = absolute(found) if isinstance(found, Path) else found
            continue
        if name == "epochs":
            free["recipe"] = replace(config.recipe, epochs=found)
            continue
        if name in PLACES and (place := _place(name, found, own[name])):
            free[name] = place
            continue
        if name not in own:
            differing.append(f"{_spelt(name, found)}, and {config.method} has no such knob")
        elif not _is_same(name, found, own[name]):
            started = "out it" if isinstance(found, bool) else f" {_shown(own[name])}"
            differing.append(f"{_spelt(name, found)}, and the run was started with{started}")
    if differing:
        raise BadConfig(
            differing[0],
            "the run's own configuration, which --resume takes",
            "leave the option out, or start a new run without --resume",
        )
    return config.made_as(replace(config, **free))


def _place(name: str, found: object, own: object) -> str | tuple[str, ...]:
    """Returns the path of a file given in the place of the run's own; empty if it is not one."""
    from sbtk_cli.train_options import absolute
    from sbtk_train.data.more_images import is_brought
    from sbtk_train.students.weights_file import find_weights

    if isinstance(found, tuple):
        is_there = own and all(Path(path).exists() for path in found)
        return tuple(str(Path(path).resolve()) for path in found) if is_there else ()
    if not own or str(found) in ("none", "imagenet") or not Path(str(found)).exists():
        return ""
    if name == "split" and not Path(str(own)).is_absolute():
        return ""  # a published or drawn one, or a file that an older version named
    if name == "class_map" and (is_brought(str(found)) or is_brought(str(own))):
        return ""
    return absolute(find_weights(str(found), None) if name == "weights" else str(found))


def _is_same(name: str, found: object, expected: object) -> bool:
    if name == "weights" and found == "imagenet":
        return True
    if name in ("weights", "teacher", "classes", "freeze_until"):
        found = "" if found == "none" else str(found)
    return found == expected


def _shown(value: object) -> object:
    return "none" if value == "" else value


def _spelt(name: str, value: object) -> str:
    """Returns an option as it is typed."""
    word = {"train_size_px": "size"}.get(name, name.replace("_", "-"))
    if isinstance(value, bool):
        return f"--{word}" if value else f"--no-{word}"
    return f"--{word} {value}"
