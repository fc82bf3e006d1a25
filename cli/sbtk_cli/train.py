"""`sbtk train`: train a student on folders of sketches and photos."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sbtk_cli import options, output, train_options
from sbtk_cli.options import Terminated, ending_of, ending_signals
from sbtk_cli.train_options import KNOBS, build_config
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import printable_name, sha256_of_file, write_atomically

if TYPE_CHECKING:
    from sbtk_train.config import Method, Settings, TrainConfig
    from sbtk_train.progress import EpochDone, StepDone
    from sbtk_train.runs.ablation import Study
    from sbtk_train.runs.loop import Trainer


@click.command()
@click.argument("data", type=options.PATH, envvar="SBTK_DATA", required=False)
@train_options.add_training_options
@click.option("--name", metavar="NAME", help="Name of the run.  [default: the method]")
@click.option(
    "--out", type=options.PATH, metavar="RUN", help="Run folder.  [default: runs/<date>-<name>]"
)
@click.option("--resume", type=options.PATH, metavar="RUN", help="Resume an interrupted run.")
@click.option(
    "--ablation",
    is_flag=True,
    help="Train every row of the ablation study with every seed; resumes an interrupted study.",
)
@click.option(
    "--seeds",
    type=options.IntRange(min=1),
    default=3,
    show_default=True,
    help="With --ablation: number of seeds.",
)
@click.option(
    "--row",
    "rows",
    multiple=True,
    metavar="NAME",
    help="With --ablation: train only this row; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each epoch.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
@click.pass_context
def command(
    context: click.Context,
    /,
    data: Path | None,
    resume: Path | None,
    out: Path | None,
    name: str | None,
    ablation: bool,
    seeds: int,
    rows: tuple[str, ...],
    config_file: Path | None,
    set_texts: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> int:
    """Train a model on sketches and photos.

    DATA is a folder with {sketch,photo}/<class>/*, or Sketchy Ext, TU-Berlin Ext or QuickDraw Ext
    as published; 'sbtk data check DATA' shows what is found. Without DATA, the folder that
    SBTK_DATA names is used. Unseen classes of the split are never read.

    Ten seen classes, drawn with a fixed seed, are held out for validation and select the epoch.
    Interrupted runs resume with --resume, to the same result.

    On several GPUs: torchrun --nproc-per-node N -m sbtk_cli train DATA. Batches are divided among
    the GPUs, so the result is that of a single process.
    """
    from sbtk_train.distributed import init_distributed
    from sbtk_train.runs.run import train

    given = _given_options(context)
    _refuse_idle(given, is_ablation=ablation, is_resumed=resume is not None)
    with init_distributed() as distributed:
        is_silent = quiet or not distributed.is_rank_zero
        reporter = Reporter(as_json and distributed.is_rank_zero, is_silent)
        if ablation and distributed.world_size > 1:
            raise BadConfig("--ablation in several processes", "one", "sbtk train --ablation")
        settings = train_options.read_settings(config_file, set_texts)
        values = train_options.apply_settings(values, given, settings)
        if "data" not in given and "data" in settings.fields:
            data = Path(settings.fields["data"])
        if ablation:
            return run_ablation(
                _require_data(data),
                values,
                settings,
                given,
                out or Path("runs") / "ablation",
                seeds,
                rows,
                reporter,
                as_json=as_json,
            )

        def start_run() -> tuple[TrainConfig, Path]:
            config = build_config(
                _require_data(data),
                values,
                reporter,
                settings=settings,
                processes=distributed.local_world_size,
            )
            config = _with_provenance(config, config_file, set_texts)
            return config, _make_folder(out, name or config.method)

        def resume_run() -> tuple[TrainConfig, Path]:
            from sbtk_train.config import read_config

            assert resume is not None
            moved_data = data if "data" in given else None
            named = [name for name in given if name in values]
            return merge_resumed_config(read_config(resume), moved_data, named, values), resume

        config, folder = distributed.broadcast_object(resume_run if resume else start_run)
        try:
            with stop_on_signal(
                lambda: distributed.is_rank_zero and not distributed.has_report()
            ) as hold:
                record = train(
                    config,
                    folder,
                    reporter,
                    resume=resume is not None,
                    on_trainer=hold,
                    distributed=distributed,
                )
        except KeyboardInterrupt:
            if distributed.is_rank_zero:
                output.notice(_next_step(folder))
            raise
    if distributed.is_rank_zero:
        output.notice(f"{folder}: {_summary(record)}", quiet=quiet)
        output.notice(f"next: sbtk export {folder}", quiet=quiet)
        if not as_json:
            output.answer(str(folder))
    return 0


def _next_step(folder: Path) -> str:
    """Return the next command after a run was stopped."""
    from sbtk_train.runs.checkpoint import LAST

    shown = shlex.quote(printable_name(folder))
    if (folder / LAST).is_file():
        return f"saved; next: sbtk train --resume {shown}"
    return f"nothing was saved yet; start again with --out {shown}"


def _given_options(context: click.Context) -> list[str]:
    """Return the names of the options and arguments on the command line, sorted."""
    source = context.get_parameter_source
    return sorted(name for name in context.params if source(name) is ParameterSource.COMMANDLINE)


def _refuse_idle(given: Sequence[str], *, is_ablation: bool, is_resumed: bool) -> None:
    """Refuse options that would have no effect."""
    if is_ablation and is_resumed:
        raise click.UsageError("An ablation resumes by itself: leave out --resume.")
    if is_ablation and "name" in given:
        raise click.UsageError("--name is for a single run; name an ablation's folder with --out.")
    if not is_ablation and ("seeds" in given or "rows" in given):
        raise click.UsageError("--seeds and --row go with --ablation.")
    if is_resumed and ("out" in given or "name" in given):
        raise click.UsageError("A run is resumed where it is: leave out --out and --name.")
    if is_resumed and ("config_file" in given or "set_texts" in given):
        raise click.UsageError("A run keeps its configuration: leave out --config and --set.")


def _with_provenance(
    config: TrainConfig, config_file: Path | None, set_texts: tuple[str, ...]
) -> TrainConfig:
    """Return the configuration with the values of `--config` and `--set`."""
    config = replace(config, settings=set_texts)
    if config_file is None:
        return config
    return replace(
        config,
        config_file=train_options.absolute(config_file),
        config_sha256=sha256_of_file(config_file),
    )


def _make_folder(out: Path | None, name: str) -> Path:
    from sbtk_train.runs.run import new_run_folder

    folder = out if out is not None else new_run_folder(Path("runs"), name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _require_data(data: Path | None) -> Path:
    if data is None:
        raise BadConfig("no data to train on", "a folder, or SBTK_DATA", "sbtk train DATA")
    return data


def _summary(record: dict[str, Any]) -> str:
    best = record.get("best", {})
    if "validation_map" in best:
        classes = len(record["validation_classes"])
        return (
            f"validation mAP@all {best['validation_map']:.4f} "
            f"({classes} seen classes kept from training)"
        )
    if "held_out_accuracy" in best:
        return f"accuracy {best['held_out_accuracy']:.4f} on held-out images of training classes"
    return f"mAP@all {best.get('held_out_map', float('nan')):.4f} of held-out sketches"


#: Defaults of every row, for small machines.
_FREEZE_UNTIL = "layer4"
_SIZE_PX = 128
#: A drawn quadruplet is four images for each sketch, so an epoch of these is longer.
_EPOCHS: dict[Method, int] = {"sbtknet": 2, "dsn": 3, "sake": 3}

#: Options that the rows set.
_OF_ROWS = (
    *("method", "recipe", "dim", "seed"),
    *("metric", "identity", "knowledge", "attention", "refit"),
)


def run_ablation(
    data: Path,
    values: dict[str, Any],
    settings: Settings,
    given: Collection[str],
    root: Path,
    seeds: int,
    rows: tuple[str, ...],
    reporter: Reporter,
    *,
    as_json: bool,
) -> int:
    """Run the missing parts of the study in `root`, score it and write the results there.

    The table is printed unless `as_json`: then stdout has the reporter's JSON lines alone.
    Returns the exit code. Unseen classes are evaluated only when no run is missing.
    """
    from sbtk_train.runs.checkpoint import locked

    named = {*given, *settings.fields, *settings.recipe}
    if "name" in settings.recipe:
        named.add("recipe")
    mistaken = [name for name in _OF_ROWS if name in named]
    if mistaken:
        raise BadConfig(
            f"--{mistaken[0]} with --ablation", "options that the rows of the study do not set"
        )
    study = _study(data, values, settings, root, seeds, rows, reporter)
    _require_teacher(study)
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        return _run_study(study, root, reporter, as_json=as_json)


def _run_study(study: Study, root: Path, reporter: Reporter, *, as_json: bool) -> int:
    from sbtk_train.runs.ablation import (
        draw,
        find_missing,
        find_others,
        format_markdown,
        run_study,
        score_runs,
        write_csv,
    )

    try:
        with stop_on_signal() as hold:
            run_study(study, root, reporter, should_stop=lambda: hold.is_stopping, on_trainer=hold)
    except KeyboardInterrupt:
        output.notice("Stopped. Run the same command to resume.")
        raise
    scores = score_runs(study, root, "validation", reporter)
    if not find_missing(study, root):
        scores += score_runs(study, root, "unseen", reporter)
    table = format_markdown(study, scores)
    write_csv(root / "ablation.csv", scores)
    write_atomically(root / "ablation.md", table.encode())
    figure = draw(study, scores, root / "ablation.png")
    reporter(f"{root}: ablation.csv, ablation.md" + (", ablation.png" if figure else ""))
    if others := find_others(study, root):
        reporter(
            f"{len(others)} finished runs of other rows or seeds are not in them, such as "
            f"{others[0]}; name all rows and seeds to include them"
        )
    if not as_json:
        output.answer(table.rstrip())
    return 0


def _study(
    data: Path,
    values: dict[str, Any],
    settings: Settings,
    root: Path,
    seeds: int,
    rows: tuple[str, ...],
    reporter: Reporter,
) -> Study:
    """Return the study of the options, by default with frozen stages and stored maps."""
    from sbtk_train.runs.ablation import Study, select_rows

    freeze_until = values["freeze_until"] or _FREEZE_UNTIL
    feature_folder = values["feature_folder"]
    if feature_folder is None and freeze_until != "none":
        feature_folder = root / "feature-maps"
    # Each row has its own recipe, so the base's is irrelevant and must cause no notices.
    no_knobs = dict.fromkeys(KNOBS) | {"knowledge": False}
    places = {"freeze_until": freeze_until, "feature_folder": feature_folder}
    return Study(
        base=build_config(
            data, values | no_knobs | places, reporter, settings=replace(settings, recipe={})
        ),
        sbtknet_recipe="sbtk",
        common=_common(values, settings),
        epochs={method: values["epochs"] or epochs for method, epochs in _EPOCHS.items()},
        seeds=tuple(range(seeds)),
        rows=select_rows(rows),
    )


def _require_teacher(study: Study) -> None:
    """Refuse rows that need a teacher if there is none, before the others are trained."""
    if study.base.weights or study.base.teacher:
        return
    recipes = {row.name: study.config(row, 0).recipe for row in study.rows}
    taught = [
        name
        for name, recipe in recipes.items()
        if getattr(recipe, "knowledge", False) or getattr(recipe, "kd_weight", 0)
    ]
    if taught:
        others = [f"--row {name}" for name in recipes if name not in taught]
        raise BadConfig(
            f"no weights and no --teacher for {', '.join(taught)}",
            "an ImageNet classifier to learn from: --weights FILE or --teacher FILE",
            " ".join(["or rows without:", *others]) if others else "",
        )


def _common(values: dict[str, Any], settings: Settings) -> dict[str, object]:
    """Return the settings that all methods share, so that losses are compared, not optimisers."""
    from sbtk_train.config import RECIPES

    ours = RECIPES["sbtknet"]["sbtk"]
    shared = (
        "augment",
        "optimizer",
        "learning_rate",
        "head_rate_factor",
        "weight_decay",
        "schedule",
        "warmup_steps",
        "patience",
        "average_decay",
    )
    common: dict[str, object] = {knob: getattr(ours, knob) for knob in shared}
    common |= {"train_size_px": _SIZE_PX, "final_epochs": 0, "selection": "validation-map"}
    knobs = [knob for knob in KNOBS if knob not in ("epochs", *_OF_ROWS)]
    common |= {knob: value for knob, value in settings.recipe.items() if knob not in KNOBS}
    return common | {knob: values[knob] for knob in knobs if values[knob] is not None}


class Reporter:
    """Prints the events of a run: progress on stderr, with `--json` a line for each epoch."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet

    def __call__(self, event: StepDone | EpochDone | str) -> None:
        """Print one event."""
        from sbtk_train.progress import EpochDone

        if isinstance(event, str):
            output.notice(event, quiet=self._quiet)
        elif isinstance(event, EpochDone):
            self._epoch(event)
        elif not self._quiet:
            terms = "  ".join(f"{name} {value:.3f}" for name, value in event.means.items())
            output.notice(
                f"epoch {event.epoch}/{event.epochs}  step {event.step}/{event.steps}  {terms}  "
                f"{event.images_per_s:.1f} images/s  "
                f"{output.duration_text(event.eta_s)} left"
            )

    def _epoch(self, event: EpochDone) -> None:
        row = event.row
        if self._as_json:
            # A metric that is undefined for a small gallery is NaN, which JSON does not have.
            known = {name: None if math.isnan(value) else value for name, value in row.items()}
            output.answer_json(known)
        mark = "best so far" if event.improved else f"{event.since_best} since the best"
        whole = (
            f"validation mAP@all {row['validation_map']:.4f}, " if "validation_map" in row else ""
        )
        output.notice(
            f"epoch {row['epoch']:.0f} ({mark}): {whole}"
            f"held-out sketches {row['held_out_map']:.4f}",
            quiet=self._quiet,
        )


class Holder:
    """Holds the running trainer for the signal handler."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.is_stopping = False

    def __call__(self, trainer: Trainer) -> None:
        """Store the trainer that is about to start."""
        self.trainer = trainer
        if self.is_stopping:
            trainer.stop_soon()


@contextlib.contextmanager
def stop_on_signal(is_printing: Callable[[], bool] = lambda: True) -> Iterator[Holder]:
    """Make the first termination signal save and stop after the current step; a second kills.

    Args:
        is_printing: whether this process prints the notice.

    Raises:
        KeyboardInterrupt: the run was stopped; a `Terminated` if that was not by Ctrl-C.
    """
    holder = Holder()
    first: list[int] = []
    before = {number: signal.getsignal(number) for number in ending_signals()}

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        if holder.trainer is None:
            os.kill(os.getpid(), number)
            return
        output.notice(
            "saving after this step; press again to stop immediately", quiet=not is_printing()
        )
        first.append(number)
        holder.is_stopping = True
        holder.trainer.stop_soon()

    for number in before:
        signal.signal(number, stop)
    try:
        yield holder
    except KeyboardInterrupt as stopped:
        if first and not isinstance(stopped, Terminated):
            raise ending_of(first[0]) from stopped
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def merge_resumed_config(
    config: TrainConfig, data: Path | None, given: Iterable[str], values: dict[str, Any]
) -> TrainConfig:
    """Return the run's own configuration with the options that may change on resuming.

    Args:
        config: of the run.
        data: the folder, if it was given on the command line.
        given: names of the options that were given on the command line.
        values: the options' values by name.

    Raises:
        BadConfig: names the first that differs, with both values.
    """
    from sbtk_cli.train_options import absolute
    from sbtk_train.config import FREE_FIELDS, PATH_FIELDS

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
        if name in PATH_FIELDS and (place := _place(name, found, own[name])):
            free[name] = place
            continue
        if name not in own:
            differing.append(
                f"{_spell_option(name, found)}, and {config.method} has no such setting"
            )
        elif not _is_same(name, found, own[name]):
            value = "none" if own[name] == "" else own[name]
            started = "out it" if isinstance(found, bool) else f" {value}"
            differing.append(f"{_spell_option(name, found)}, and the run was started with{started}")
    if differing:
        raise BadConfig(
            differing[0],
            "the run's own configuration, which --resume takes",
            "leave the option out, or start a new run without --resume",
        )
    return config.merge_free_fields(replace(config, **free))


def _place(name: str, found: object, own: object) -> str | tuple[str, ...]:
    """Return the path of a file that replaces the run's own; empty if it is not a file."""
    from sbtk_cli.train_options import absolute
    from sbtk_train.data.more_images import is_bundled
    from sbtk_train.models.weights_file import find_weights

    if isinstance(found, tuple):
        is_there = own and all(Path(path).exists() for path in found)
        return tuple(str(Path(path).resolve()) for path in found) if is_there else ()
    if not own or str(found) in ("none", "imagenet") or not Path(str(found)).exists():
        return ""
    if name == "split" and not Path(str(own)).is_absolute():
        return ""  # a published or drawn one, or a file that an older version named
    if name == "class_map" and (is_bundled(str(found)) or is_bundled(str(own))):
        return ""
    return absolute(find_weights(str(found), None) if name == "weights" else str(found))


def _is_same(name: str, found: object, expected: object) -> bool:
    if name == "weights" and found == "imagenet":
        return True
    if name in ("weights", "teacher", "classes", "freeze_until"):
        found = "" if found == "none" else str(found)
    return found == expected


def _spell_option(name: str, value: object) -> str:
    """Return an option as typed on the command line."""
    word = {"train_size_px": "size"}.get(name, name.replace("_", "-"))
    if isinstance(value, bool):
        return f"--{word}" if value else f"--no-{word}"
    return f"--{word} {value}"
