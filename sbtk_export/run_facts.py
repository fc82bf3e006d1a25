"""What a training run says about its student, as the bundle's manifest and card tell it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.preprocess import SIZE_PX
from sbtk_train.data.splits import Split, split_names
from sbtk_train.recipes import Selection
from sbtk_train.runs.checkpoint import RECORD, TrainedRun
from sbtk_train.runs.evaluate import SELECTED_BY

_METRICS = {
    "validation_map": "mAP@all (plain AP, mean over sketches) of the {classes} validation classes, "
    "their sketches against their photos",
    "validation_p10": "precision at 10, likewise",
    "held_out_map": "mAP@all of held-out sketches of training classes against five training "
    "photos of each",
    "held_out_bits_map": "mAP@all (mean over classes) of 64-bit codes of held-out sketches of "
    "training classes against training photos, ITQ fitted on these sketches",
    "held_out_accuracy": "share of held-out sketches whose training class has the highest logit",
}

# Words in a data folder's or weights file's name, and what is known of that source.
_SOURCES = (
    ("sketchy", "The Sketchy Database (Sangkloy et al. 2016), which is for research use only"),
    ("imagenet", "ImageNet, whose images are for non-commercial research"),
    ("quickdraw", "Quick, Draw! drawings by Google, CC BY 4.0"),
    ("tu-berlin", "TU-Berlin sketches (Eitz et al. 2012), CC BY 4.0"),
    ("tuberlin", "TU-Berlin sketches (Eitz et al. 2012), CC BY 4.0"),
)


@dataclass(frozen=True)
class StudentFacts:
    """What is told about a student.

    Attributes:
        method: `sbtknet`, `dsn` or `sake`.
        backbone: layout of the trunk.
        training_classes: classes that it was trained on; calibration and parity use these.
        validation_classes: seen classes that it was not trained on; ranking uses these.
        training: for the manifest, licence included.
        metrics: for the manifest, each figure with its rule.
    """

    method: str
    backbone: str
    training_classes: tuple[str, ...]
    validation_classes: tuple[str, ...]
    training: dict[str, Any]
    metrics: dict[str, Any]


def facts_from_run(run: TrainedRun) -> StudentFacts:
    """Returns what the run's record and configuration say.

    Raises:
        BadConfig: the record lacks something.
        BadData: the record names an unseen class as a seen one.
    """
    record, config = run.record, run.config
    training_classes = _names(run, "training_classes")
    validation_classes = _names(run, "validation_classes")
    is_file = config.split not in split_names()
    split = Split(Path(config.split).name, _names(run, "unseen_classes"), is_file=is_file)
    mistaken = [n for n in (*training_classes, *validation_classes) if split.is_unseen(n)]
    if mistaken:
        raise BadData(
            f"{run.folder / RECORD} lists {', '.join(mistaken)} as seen, unseen in {split.name}",
            "lists that do not overlap",
            "train again: sbtk train DATA",
        )
    copied = ("data", "data_sha256", "split", "training_sketches", "training_photos")
    also = ("weights", "teacher", "recipe", "epochs_done", "seed", "division_seed", "device")
    sources = [
        str(record.get("data", "")),
        str(_file_name(record.get("weights"))),
    ]
    training: dict[str, Any] = {key: record.get(key) for key in copied}
    training["training_classes"] = len(training_classes)
    training["validation_classes"] = list(validation_classes)
    training["unseen_classes"] = list(split.unseen)
    training |= {key: record.get(key) for key in also}
    training |= _averaged_training(record)
    training["versions"] = record.get("versions", {})
    training["licence"] = licence_text(sources)
    return StudentFacts(
        method=config.method,
        backbone=config.backbone,
        training_classes=training_classes,
        validation_classes=validation_classes,
        training={key: value for key, value in training.items() if value not in (None, [], "")},
        metrics=_metrics(record, len(validation_classes), config.recipe.selection),
    )


def licence_text(sources: list[str]) -> str:
    """Returns what is known about the use of a model, by the names of what it was made from."""
    names = [name.lower() for name in sources]
    known = [
        told for word, told in _SOURCES if any(word in name.replace("_", "-") for name in names)
    ]
    if not known:
        return (
            f"Not known. It follows from the licences of what the model was made from "
            f"({', '.join(filter(None, sources)) or 'not recorded'}): ask whoever published them."
        )
    made_from = "Made from " + "; ".join(dict.fromkeys(known)) + "."
    is_research = any("research" in told for told in known)
    return f"Research use only. {made_from}" if is_research else made_from


def _names(run: TrainedRun, key: str) -> tuple[str, ...]:
    value = run.record.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise BadConfig(f"{run.folder / RECORD} lacks the list {key!r}", "a run made by sbtk train")
    return tuple(value)


def _file_name(value: object) -> str:
    return str(value.get("file", "")) if isinstance(value, dict) else ""


def _metrics(
    record: dict[str, Any], validation_classes: int, selection: Selection
) -> dict[str, Any]:
    """Returns the figures of the student that was kept, each with its rule."""
    best = record.get("best")
    if not isinstance(best, dict):
        return {}
    metrics = {}
    for name, rule in _METRICS.items():
        if name in best:
            told = [rule.format(classes=validation_classes)]
            told += _size_told(record, name)
            told += _choice_told(_parts(record), name, selection)
            metrics[name] = {"value": best[name], "rule": "; ".join(told)}
    return metrics


def _size_told(record: dict[str, Any], name: str) -> list[str]:
    """Returns the side of the images, where it is not production's."""
    size_px = record.get("validation_px", SIZE_PX)
    is_measured_again = name.startswith("validation") and "refitted_map" in record.get("refit", {})
    return [] if size_px == SIZE_PX or is_measured_again else [f"images of {size_px} px"]


def _choice_told(parts: list[dict[str, Any]], name: str, selection: Selection) -> list[str]:
    """Returns what a figure has chosen: an epoch, or those of the students that were averaged."""
    if not parts:
        return ["chose the epoch"] if SELECTED_BY[selection] == name else []
    told = [f"of the mean of {len(parts)} students' weights"]
    chosen = [part for part in parts if _selected_by(part) == name]
    if chosen:
        which = "each" if len(chosen) == len(parts) else f"{len(chosen)} of them"
        told.append(f"{which} taken at the epoch that its own such figure chose")
    return told


def _averaged_training(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the students that were averaged; a recipe that all have is told once."""
    parts = _parts(record)
    if not parts:
        return {}
    recipes = [part.get("recipe") for part in parts]
    is_common = all(recipe == recipes[0] for recipe in recipes)
    left_out = ("recipe",) if is_common else ()
    told = [
        {key: value for key, value in part.items() if key not in left_out and value is not None}
        for part in parts
    ]
    return {"recipe": recipes[0] if is_common else None, "epochs_done": None, "averaged": told}


def _parts(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in record.get("averaged") or [] if isinstance(part, dict)]


def _selected_by(part: dict[str, Any]) -> str | None:
    """Returns the figure that chose a part's epoch; runs of old had but one rule."""
    if "mean_of" in part:
        return None
    return SELECTED_BY.get((part.get("recipe") or {}).get("selection", "validation-map"))
