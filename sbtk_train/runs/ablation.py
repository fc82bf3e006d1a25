"""The ablation study: which parts of a method carry it, with a spread over seeds.

The rows are those of the SBTKNet paper's Table 5, then SBTKNet against DSN and SAKE at two lengths
of the embedding. Each row is trained with each seed as a run of its own, in its own folder, so that
a study that was stopped goes on where it was. Unseen classes are looked at once, when every run
has ended; nothing is chosen by them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sbtk_runtime.errors import BadConfig, DiskFull
from sbtk_runtime.files import write_json_atomically
from sbtk_train.config import FREE_FIELDS, PLACES, TrainConfig, read_config
from sbtk_train.progress import Listener
from sbtk_train.recipes import Method, Recipe, default_recipe, recipe, recipe_type
from sbtk_train.runs.checkpoint import LAST
from sbtk_train.runs.run import train

#: Written when a run has ended; a run without it is gone on with.
DONE = "done.json"


@dataclass(frozen=True)
class Row:
    """One line of the study.

    Attributes:
        name: of its folder and in the results.
        title: for people.
        method: `sbtknet`, `dsn` or `sake`.
        dim: length of the embedding.
        changes: knobs of the recipe that make this row.
        rounds: times the method's epochs, where an epoch of this row shows fewer images.
    """

    name: str
    title: str
    method: Method = "sbtknet"
    dim: int = 512
    changes: dict[str, object] = field(default_factory=dict)
    rounds: int = 1


_ALONE: dict[str, object] = {
    "batches": "quadruplets",
    "identity": False,
    "knowledge": False,
    "attention": False,
    "refit": False,
}
_ALL = _ALONE | {"metric": "quadruplet", "identity": True, "knowledge": True}

TABLE_5: tuple[Row, ...] = (
    Row("triplet", "triplet", changes=_ALONE | {"metric": "triplet"}),
    Row("quadruplet", "quadruplet", changes=_ALONE | {"metric": "quadruplet"}),
    Row(
        "quadruplet-identity",
        "quadruplet + identity",
        changes=_ALONE | {"metric": "quadruplet", "identity": True},
    ),
    Row(
        "quadruplet-knowledge",
        "quadruplet + knowledge",
        changes=_ALONE | {"metric": "quadruplet", "knowledge": True},
    ),
    Row("all", "all three losses", changes=_ALL),
    Row("all-attention", "all three + attention", changes=_ALL | {"attention": True}),
)
#: The default recipe's metric term, which is not the paper's.
CONTRASTIVE = Row(
    "contrastive",
    "contrastive, all in the batch, + identity + knowledge",
    changes=_ALL | {"metric": "contrastive", "batches": "class-balanced"},
    rounds=2,
)
METHODS_COMPARED: tuple[Row, ...] = (
    Row("sbtknet-64", "SBTKNet, 64-d", dim=64, changes=_ALL),
    Row("sake-512", "SAKE, 512-d", "sake", 512),
    Row("sake-64", "SAKE, 64-d", "sake", 64),
    Row("dsn-512", "DSN, 512-d", "dsn", 512),
    Row("dsn-64", "DSN, 64-d", "dsn", 64),
)
ROWS: tuple[Row, ...] = (*TABLE_5, CONTRASTIVE, *METHODS_COMPARED)


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        base: the configuration that every row changes: data, split, weights, frozen stages, size.
        sbtknet_recipe: SBTKNet's recipe before a row's changes.
        common: knobs that each recipe which has them takes over, such as the image size.
        epochs: by method.
        seeds: of initialisation, order and augmentation; validation classes are always the same.
        rows: the lines.
    """

    base: TrainConfig
    sbtknet_recipe: str
    common: dict[str, object]
    epochs: dict[Method, int]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...] = ROWS

    def config(self, row: Row, seed: int) -> TrainConfig:
        """Returns the configuration of one run."""
        return replace(
            self.base,
            method=row.method,
            recipe=self._recipe(row),
            dim=row.dim,
            seed=seed,
        )

    def epochs_of(self, row: Row) -> int:
        """Returns for how many epochs a row is trained."""
        return row.rounds * self.epochs[row.method]

    def _recipe(self, row: Row) -> Recipe:
        own = {knob.name for knob in fields(recipe_type(row.method))}
        shared = {knob: value for knob, value in self.common.items() if knob in own}
        knobs = shared | row.changes | {"epochs": self.epochs_of(row)}
        name = self.sbtknet_recipe
        if row.method != "sbtknet":
            name = default_recipe(row.method, self.base.split)
        return recipe(name, row.method, **knobs)

    def runs(self) -> Iterator[tuple[Row, int]]:
        """Yields every row with every seed, a whole seed before the next."""
        for seed in self.seeds:
            for row in self.rows:
                yield row, seed


def run_folder(root: Path, row: Row, seed: int) -> Path:
    """Returns the folder of one run of a study."""
    return root / f"{row.name}-seed{seed}"


def is_done(folder: Path) -> bool:
    """Says whether the run in `folder` has ended."""
    return (folder / DONE).is_file()


def run_study(
    study: Study,
    root: Path,
    listener: Listener,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_trainer: Callable[[Any], None] | None = None,
) -> None:
    """Trains what is not yet trained of a study; each run leaves its best student and its record.

    Args:
        study: what to run.
        root: holds a folder for each run.
        listener: told what a run tells.
        should_stop: asked between two runs.
        on_trainer: handed each trainer before it starts, so that a signal can stop it.

    Raises:
        BadConfig: a folder holds a run of another configuration.
        KeyboardInterrupt: when stopped; everything that was done is kept.
    """
    runs = list(study.runs())
    for number, (row, seed) in enumerate(runs, start=1):
        if should_stop():
            raise KeyboardInterrupt
        folder = run_folder(root, row, seed)
        config = study.config(row, seed)
        if is_done(folder):
            _require_same(folder, config)
            continue
        listener(f"run {number} of {len(runs)}: {row.title}, seed {seed}")
        folder.mkdir(parents=True, exist_ok=True)
        resume = (folder / LAST).is_file()
        if resume:
            _require_same(folder, config)
        try:
            record = train(config, folder, listener, resume=resume, on_trainer=on_trainer)
        except DiskFull as problem:
            step = "free some space, then: the same command again, which goes on where it stopped"
            raise DiskFull(problem.found, problem.expected, step) from problem
        write_json_atomically(folder / DONE, {"best": record.get("best", {})})
        # Four times the student, and of no use any more.
        (folder / LAST).unlink(missing_ok=True)


def finished(study: Study, root: Path) -> list[tuple[Row, int, Path]]:
    """Returns row, seed and folder of each run that has ended."""
    found = [(row, seed, run_folder(root, row, seed)) for row, seed in study.runs()]
    return [item for item in found if is_done(item[2])]


def missing(study: Study, root: Path) -> list[str]:
    """Returns the names of the folders of runs that have not ended."""
    folders = [run_folder(root, row, seed) for row, seed in study.runs()]
    return [folder.name for folder in folders if not is_done(folder)]


def chosen_rows(names: Sequence[str]) -> tuple[Row, ...]:
    """Returns the rows of these names, in the study's order; all for no names.

    Raises:
        BadConfig: there is no such row.
    """
    known = {row.name for row in ROWS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BadConfig(f"no row {unknown[0]!r} in the ablation", ", ".join(r.name for r in ROWS))
    return tuple(row for row in ROWS if not names or row.name in names)


def _require_same(folder: Path, config: TrainConfig) -> None:
    """Refuses a run that was started with another configuration, and says what differs."""
    there, here = asdict(read_config(folder)), asdict(config)
    for free in FREE_FIELDS:
        there.pop(free), here.pop(free)
    for place in PLACES:  # older studies hold paths as they were typed
        for values in (there, here):
            values[place] = values[place] and str(Path(values[place]).absolute())
    there_flat, here_flat = _flat(there), _flat(here)
    for key in sorted(set(there_flat) | set(here_flat)):
        if there_flat.get(key) != here_flat.get(key):
            raise BadConfig(
                f"{folder} was trained with {key} = {json.dumps(there_flat.get(key))}",
                f"{json.dumps(here_flat.get(key))}, as asked for now",
                "the options of the first time, or another folder: --out FOLDER",
            )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    recipe_values = {f"recipe.{key}": value for key, value in values["recipe"].items()}
    return {key: value for key, value in values.items() if key != "recipe"} | recipe_values
