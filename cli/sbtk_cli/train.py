"""`sbtk train`: from folders of sketches and photos to a student."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from sbtk_cli import output
from sbtk_runtime.errors import BadConfig

if TYPE_CHECKING:
    from sbtk_train.config import TrainConfig
    from sbtk_train.loop import Trainer
    from sbtk_train.progress import EpochDone, StepDone

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("data", type=_PATH, envvar="SBTK_DATA", required=False)
@click.option(
    "--split",
    default="SK-YE",
    show_default=True,
    metavar="NAME|FILE",
    help="Classes kept unseen: a published split, or a file with one class a line.",
)
@click.option(
    "--classes",
    type=_PATH,
    metavar="FILE",
    help="Use only the seen classes that FILE lists, one a line.",
)
@click.option(
    "--recipe",
    default="sbtk",
    show_default=True,
    metavar="NAME",
    help="How to train: sbtk, or paper (the published settings).",
)
@click.option(
    "--backbone",
    type=click.Choice(["resnet50-v1.5", "resnet50-v1", "resnet18"]),
    help="Layout of the network.  [default: what the weights file says]",
)
@click.option(
    "--weights",
    default="imagenet",
    show_default=True,
    metavar="FILE",
    help="Start from: a .safetensors or .pth file, imagenet (a local copy), or none.",
)
@click.option(
    "--teacher",
    type=_PATH,
    metavar="FILE",
    help="Classifier that makes the soft labels.  [default: the weights]",
)
@click.option(
    "--dim",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Length of an embedding.",
)
@click.option(
    "--metric",
    type=click.Choice(["quadruplet", "triplet", "contrastive"]),
    help="The metric loss.  [default: the recipe's]",
)
@click.option("--identity/--no-identity", default=None, help="The classification loss.")
@click.option("--knowledge/--no-knowledge", default=None, help="The knowledge loss.")
@click.option("--attention/--no-attention", default=None, help="Attention before pooling.")
@click.option("--augment/--no-augment", default=None, help="Augmentation.")
@click.option("--epochs", type=click.IntRange(min=1), help="Override the recipe's epochs.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Override the recipe's learning rate.",
)
@click.option("--margin", type=click.FloatRange(min=0, max=4), help="Override the margin.")
@click.option(
    "--quadruplets", type=click.IntRange(min=2), help="Override the batch: four images for each."
)
@click.option(
    "--size",
    "train_size_px",
    type=click.IntRange(min=32, max=1024),
    metavar="PX",
    help="Override the side of the training images.",
)
@click.option(
    "--final-epochs",
    type=click.IntRange(min=0),
    help="Override how many last epochs run at 224 px.",
)
@click.option(
    "--freeze-until",
    type=click.Choice(["layer1", "layer2", "layer3", "layer4"]),
    help="Keep the stages before this one as they are (for small machines).",
)
@click.option(
    "--validation-classes",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Seen classes kept from training, for selection.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of initialisation, order and augmentation.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Number format of the network's arithmetic.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch.")
@click.option("--workers", type=click.IntRange(min=1), help="Image decoding threads.")
@click.option(
    "--checkpoint-minutes",
    type=click.FloatRange(min=0),
    default=5,
    show_default=True,
    help="Save a running epoch this often.",
)
@click.option("--name", default="sbtknet", show_default=True, help="Of the run folder.")
@click.option("--out", type=_PATH, metavar="RUN", help="Run folder.  [default: runs/<date>-<name>]")
@click.option("--resume", type=_PATH, metavar="RUN", help="Go on with a stopped run.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each epoch.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
def command(
    data: Path | None,
    resume: Path | None,
    out: Path | None,
    name: str,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Train a model on sketches and photos.

    They lie in DATA/{sketch,photo}/<class>/*. Classes of the split are never looked at. Ten seen
    classes, drawn by a fixed seed, are kept for validation; the student that is best on them is
    kept. A stopped or killed run goes on with --resume and ends as it would have.

    Without DATA, trains on what SBTK_DATA names.
    """
    from sbtk_train.run import new_run_folder, train

    reporter = _Reporter(as_json, quiet)
    if resume is not None:
        from sbtk_train.config import read_config

        config, folder = read_config(resume), resume
    else:
        if data is None:
            raise BadConfig("no data to train on", "a folder, or SBTK_DATA", "sbtk train DATA")
        config = _config(data, options, reporter)
        folder = out if out is not None else new_run_folder(Path("runs"), name)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "last.safetensors").exists():
            raise BadConfig(
                f"{folder} already holds a run", "a new folder", f"sbtk train --resume {folder}"
            )
    with _stopping_by_signal() as hold:
        record = train(config, folder, reporter, resume=resume is not None, on_trainer=hold)
    best = record.get("best", {})
    summary = f"{folder}: validation mAP@all {best.get('validation_map', float('nan')):.4f}"
    output.notice(
        f"{summary} (10 seen classes kept from training)".replace(
            "10", str(len(record["validation_classes"]))
        ),
        quiet=quiet,
    )
    output.notice(f"next: sbtk export {folder}", quiet=quiet)
    if not as_json:
        output.answer(str(folder))
    return 0


def _config(data: Path, options: dict[str, Any], reporter: _Reporter) -> TrainConfig:
    from sbtk_train.config import TrainConfig
    from sbtk_train.loop import default_workers
    from sbtk_train.recipes import recipe
    from sbtk_train.setup import choose_backbone, find_weights

    weights = None
    if options["weights"] != "none":
        weights = find_weights(options["weights"], options["backbone"])
    knobs = (
        "metric",
        "identity",
        "knowledge",
        "attention",
        "augment",
        "epochs",
        "learning_rate",
        "margin",
        "quadruplets",
        "train_size_px",
        "final_epochs",
    )
    changes = {knob: options[knob] for knob in knobs if options[knob] is not None}
    if weights is None and options["teacher"] is None and options["knowledge"] is None:
        changes["knowledge"] = False
        reporter("no weights and no --teacher: training without the knowledge loss")
    return TrainConfig(
        data=str(data),
        split=options["split"],
        recipe=recipe(options["recipe"], **changes),
        classes="" if options["classes"] is None else str(options["classes"]),
        backbone=choose_backbone(weights, options["backbone"], reporter),
        weights="" if weights is None else str(weights),
        teacher="" if options["teacher"] is None else str(options["teacher"]),
        dim=options["dim"],
        freeze_until=options["freeze_until"] or "",
        seed=options["seed"],
        validation_classes=options["validation_classes"],
        precision=options["precision"],
        device=options["device"],
        workers=options["workers"] or default_workers(),
        threads=options["threads"] or 0,
        checkpoint_minutes=options["checkpoint_minutes"],
    )


class _Reporter:
    """Prints what a run tells: progress on stderr, with `--json` a line for each epoch."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet

    def __call__(self, event: StepDone | EpochDone | str) -> None:
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
        if self._as_json:
            output.answer_json(event.row)
        row = event.row
        mark = "best so far" if event.improved else f"{event.since_best} since the best"
        output.notice(
            f"epoch {row['epoch']:.0f}: validation mAP@all {row['validation_map']:.4f} ({mark}), "
            f"held-out sketches {row['held_out_map']:.4f}",
            quiet=self._quiet,
        )


class _Holder:
    """Holds the running trainer for the signal handler."""

    trainer: Trainer | None = None

    def __call__(self, trainer: Trainer) -> None:
        self.trainer = trainer


@contextlib.contextmanager
def _stopping_by_signal() -> Iterator[_Holder]:
    """Makes the first SIGINT or SIGTERM save and stop after the step under way; a second kills."""
    holder = _Holder()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        if holder.trainer is None:
            os.kill(os.getpid(), number)
            return
        output.notice("saving after this step; press again to stop at once")
        holder.trainer.stop_soon()

    for number in before:
        signal.signal(number, stop)
    try:
        yield holder
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
