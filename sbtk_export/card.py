"""The model card, generated from the bundle's manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbtk_runtime.bundle import code_lengths
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.manifest import BundleManifest
from sbtk_runtime.onnx_file import INPUT_NAME
from sbtk_runtime.preprocess import PREPROCESSINGS, SIZE_PX, Preprocessing
from sbtk_train.config import SbtknetRecipe, Selection, TrainConfig
from sbtk_train.data.splits import Split, split_names
from sbtk_train.runs.checkpoint import RECORD, TrainedRun
from sbtk_train.runs.evaluate import SELECTION_METRICS

CARD_NAME = "MODEL_CARD.md"

_PARITY_COLUMNS = (
    ("cosine_min", "cosine min", "{:.5f}"),
    ("cosine_min_sketches", "of sketches", "{:.5f}"),
    ("cosine_min_photos", "of photos", "{:.5f}"),
    ("cosine_mean", "cosine mean", "{:.5f}"),
    ("norm_error", "largest \\|norm - 1\\|", "{:.1e}"),
    ("top10_agreement", "top-10 agreement", "{:.1%}"),
    ("map_model", "mAP@all", "{:.4f}"),
    ("map_torch", "mAP@all of torch", "{:.4f}"),
    ("images", "images", "{:,}"),
    ("ranking_images", "ranked", "{:,}"),
    ("engine", "run by", "{}"),
)

_USE = """\
Finding photos of an object from a drawing of it, on your own machine: the model maps sketches and
photos into the same space, and the photos nearest to a sketch are the hits. Photos can be found
from photos in the same way."""

_LIMITS = """\
- It recognises what an object is better than how it is drawn: among several photos of horses it
  does not reliably find the one horse that was traced.
- It was not trained for scenes, text, faces of particular people, or small objects at the edge of
  an image. It must not be used to identify persons.
- Classes unlike its training classes are found less well; the metrics above say how much for the
  classes that they name.
- Scores are cosines. They rank photos for one sketch; they are not probabilities."""


def render_model_card(manifest: BundleManifest) -> str:
    """Return the model card in Markdown; everything in it comes from the manifest."""
    training = dict(manifest.training)
    licence = training.pop("licence", "not known")
    summary = training.pop("summary", "")
    parts = [
        f"# {manifest.name}",
        f"A {manifest.backbone} student trained by {manifest.method}, {manifest.dim} dimensions, "
        f"exported on {manifest.created[:10]}. Model id `{manifest.model_id}`. {summary}".rstrip(),
        _section("Intended use", _USE),
        _section("Input", _render_input(manifest)),
        _section("Licence", str(licence)),
        _section("Training", _bullets(training)),
        _section("Metrics", _render_metrics(manifest.metrics)),
        _section("Parity with torch", _render_parity(manifest.parity)),
        *_render_codes(manifest),
        _section("Limits", _LIMITS),
        _section("Files", _render_files(manifest)),
        _section("Versions", _bullets(manifest.versions)),
    ]
    return "\n\n".join(parts) + "\n"


def _render_metrics(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "None recorded."
    notes = []
    if "unseen_map" not in metrics:
        notes.append("Not measured on unseen classes.")
    if "validation_map" in metrics:
        notes.append(
            "The validation classes were not trained on, but they also chose the recipe and the "
            "epochs: figures on them are optimistic."
        )
    return "\n\n".join([_bullets(metrics), *notes])


def _render_codes(manifest: BundleManifest) -> list[str]:
    bits = code_lengths(manifest)
    if not bits:
        return []
    options = " or ".join(f"`--bits {length}`" for length in bits)
    text = (
        f"`sbtk index` and `sbtk embed` make binary codes of the embeddings with {options}: ITQ "
        "(Gong and Lazebnik 2011), compared by Hamming distance. The metrics above show the "
        "loss."
    )
    return [_section("Binary codes", text)]


def _render_input(manifest: BundleManifest) -> str:
    """Return the description of the model's input."""
    in_words = " (in words: PREPROCESSING.md)" if "PREPROCESSING.md" in manifest.files else ""
    text = (
        f"`{INPUT_NAME} (N, {SIZE_PX}, {SIZE_PX}, 3) uint8`: RGB, prepared by "
        f"`{manifest.preprocessing}`{in_words}. Scaling, mean and standard deviation are part of "
        "the model."
    )
    if not PREPROCESSINGS[manifest.preprocessing].ink_crop:
        text += " Sketches are shown whole, not cropped to their ink."
    if manifest.domain_input is None:
        return f"{text} The model is not told whether an image is a sketch or a photo."
    return (
        f"{text} `{manifest.domain_input} (N,) float32`: 0 for a sketch, 1 for a photo; the same "
        "pixels have different embeddings as a sketch and as a photo."
    )


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _bullets(values: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in values.items():
        label = key.replace("_", " ")
        if isinstance(value, Mapping):
            lines += [f"{indent}- {label}:", _bullets(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, item in enumerate(value, start=1):
                lines += [f"{indent}- {label}, {number}:", _bullets(item, indent + "  ")]
        else:
            lines.append(f"{indent}- {label}: {_format_value(value)}")
    return "\n".join(lines)


def _format_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _render_parity(parity: Mapping[str, Any]) -> str:
    heading = ["precision", *(title for _, title, _ in _PARITY_COLUMNS)]
    rows = [heading, ["---"] * len(heading)]
    for precision, figures in parity.items():
        cells = [shape.format(figures[key]) for key, _, shape in _PARITY_COLUMNS]
        rows.append([precision, *cells])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    same_sums = "".join(
        f" In {precision}, two products of 8-bit numbers add up to at most "
        f"{figures['largest_pair_sum']:,}, which 16 bits hold: sums are the same on processors "
        "with and without VNNI."
        for precision, figures in parity.items()
        if "largest_pair_sum" in figures
    )
    return (
        f"{table}\n\n"
        "Each file was run by sbtk's own engine and compared with torch in FP32, on the same "
        "images of seen classes, half of them sketches, none of them used for calibration. Norms "
        "are those of the model's output. mAP@all is plain AP, mean over sketches." + same_sums
    )


def _render_files(manifest: BundleManifest) -> str:
    rows = [
        f"- `{name}`: {record.size_bytes:,} bytes, SHA-256 `{record.sha256}`"
        for name, record in manifest.files.items()
        if name != CARD_NAME
    ]
    return "\n".join(rows)


_METRICS = {
    "validation_map": "mAP@all (plain AP, mean over sketches) of the {classes} validation classes, "
    "their sketches against their photos",
    "validation_p10": "precision at 10 on the same images",
    "held_out_map": "mAP@all of held-out sketches of training classes against five training "
    "photos of each",
    "held_out_bits_map": "mAP@all (mean over classes) of 64-bit codes of held-out sketches of "
    "training classes against training photos, ITQ fitted on these sketches",
    "held_out_accuracy": "share of held-out {images} whose training class has the highest logit",
}

# Words in the name of a data folder or weights file, and the source that they mean.
_SOURCES = (
    ("sketchy", "The Sketchy Database (Sangkloy et al. 2016), which is for research use only"),
    ("imagenet", "ImageNet, whose images are for non-commercial research"),
    ("quickdraw", "Quick, Draw! drawings by Google, CC BY 4.0"),
    ("caltech", "Caltech-101 (Fei-Fei et al. 2004), whose photos are for research use only"),
    ("tu-berlin", "TU-Berlin sketches (Eitz et al. 2012), CC BY 4.0"),
    ("tuberlin", "TU-Berlin sketches (Eitz et al. 2012), CC BY 4.0"),
)


@dataclass(frozen=True)
class StudentFacts:
    """Facts about a student, for the manifest and the card.

    Attributes:
        method: `sbtknet`, `dsn` or `sake`.
        backbone: layout of the trunk.
        preprocessing: of the images that it was trained on.
        training_classes: classes that it was trained on; calibration and parity use these.
        validation_classes: seen classes that it was not trained on; ranking uses these.
        training: for the manifest, licence included.
        metrics: for the manifest, each with its rule.
    """

    method: str
    backbone: str
    preprocessing: Preprocessing
    training_classes: tuple[str, ...]
    validation_classes: tuple[str, ...]
    training: dict[str, Any]
    metrics: dict[str, Any]


def collect_facts(run: TrainedRun) -> StudentFacts:
    """Return the facts in the run's record and configuration.

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
    copied = (
        "data",
        "data_sha256",
        "further_data",
        "split",
        "training_sketches",
        "training_photos",
    )
    also = ("weights", "teacher", "recipe", "epochs_done", "seed", "division_seed", "device")
    sources = [
        str(record.get("data", "")),
        *map(str, record.get("further_data") or ()),
        str(_file_name(record.get("weights"))),
    ]
    training: dict[str, Any] = {key: record.get(key) for key in copied}
    training["training_classes"] = len(training_classes)
    training["validation_classes"] = list(validation_classes)
    training["unseen_classes"] = list(split.unseen)
    training |= {key: record.get(key) for key in also}
    training |= _averaged_training(record)
    training["versions"] = record.get("versions", {})
    training["summary"] = describe_student(config, record)
    training["licence"] = describe_licence(sources)
    return StudentFacts(
        method=config.method,
        backbone=config.backbone,
        preprocessing=config.recipe.preprocessing,
        training_classes=training_classes,
        validation_classes=validation_classes,
        training={key: value for key, value in training.items() if value not in (None, [], "")},
        metrics=_metrics(record, len(validation_classes), config.recipe.selection),
    )


_METRIC_LOSSES = {
    "quadruplet": "the domain-aware quadruplet loss",
    "triplet": "a triplet loss",
    "contrastive": "a supervised contrastive loss in place of the paper's quadruplet loss",
}


def describe_student(config: TrainConfig, record: Mapping[str, Any]) -> str:
    """Return a sentence on the losses, and on the refitted embedding and what it gained."""
    recipe, parts = config.recipe, record.get("averaged") or []
    if not isinstance(recipe, SbtknetRecipe):
        return f"Trained with the recipe {recipe.name}."
    losses = [
        *(["classification loss"] if recipe.identity else []),
        *(["knowledge loss"] if recipe.knowledge else []),
        _METRIC_LOSSES[recipe.metric],
    ]
    mean = f", the mean of {len(parts)} runs" if parts else ""
    text = f"SBTKNet with {_join(losses)}{mean}"
    refits = [part.get("refit") for part in parts] if parts else [record.get("refit")]
    kept = [refit for refit in refits if isinstance(refit, Mapping) and refit.get("kept")]
    if not recipe.refit or (refits[0] is not None and not kept):
        return f"{text}."
    text += "; its embedding is refitted from the soft-label head"
    gains = [
        f"from {refit['trained_map']:.3f} to {refit['refitted_map']:.3f}"
        for refit in kept
        if "trained_map" in refit
    ]
    if gains:
        where = " of the runs" if parts else ""
        text += f", which raised validation mAP@all{where} {_join(gains)}"
    return f"{text}."


def _join(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def describe_licence(sources: list[str]) -> str:
    """Return the licence of a model as far as the names of its sources show."""
    names = [name.lower() for name in sources]
    known = [
        source for word, source in _SOURCES if any(word in name.replace("_", "-") for name in names)
    ]
    if not known:
        return (
            f"Not known. It follows from the licences of the model's sources "
            f"({', '.join(filter(None, sources)) or 'not recorded'}): ask whoever published them."
        )
    made_from = "Made from " + "; ".join(dict.fromkeys(known)) + "."
    is_research = any("research" in source for source in known)
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
    """Return the metrics of the best student, each with its rule."""
    best = record.get("best")
    if not isinstance(best, dict):
        return {}
    images = "sketches and photos" if record.get("held_out_photos") else "sketches"
    metrics = {}
    for name, rule in _METRICS.items():
        if name in best:
            rules = [rule.format(classes=validation_classes, images=images)]
            rules += _describe_size(record, name)
            rules += _describe_choice(_parts(record), name, selection)
            metrics[name] = {"value": best[name], "rule": "; ".join(rules)}
    return metrics


def _describe_size(record: dict[str, Any], name: str) -> list[str]:
    """Return the size of the images, if it is not the runtime's."""
    size_px = record.get("validation_px", SIZE_PX)
    is_measured_again = name.startswith("validation") and "refitted_map" in record.get("refit", {})
    return [] if size_px == SIZE_PX or is_measured_again else [f"images of {size_px} px"]


def _describe_choice(parts: list[dict[str, Any]], name: str, selection: Selection) -> list[str]:
    """Return what a metric selected: an epoch, or those of the averaged students."""
    if not parts:
        return ["used to select the epoch"] if SELECTION_METRICS[selection] == name else []
    rules = [f"of the mean of {len(parts)} students' weights"]
    chosen = [part for part in parts if _selected_by(part) == name]
    if chosen:
        which = "each" if len(chosen) == len(parts) else f"{len(chosen)} of them"
        rules.append(f"{which} from the epoch that its own value of this metric selected")
    return rules


def _averaged_training(record: dict[str, Any]) -> dict[str, Any]:
    """Return the students that were averaged; a recipe that all share is given once."""
    parts = _parts(record)
    if not parts:
        return {}
    recipes = [part.get("recipe") for part in parts]
    is_common = all(recipe == recipes[0] for recipe in recipes)
    left_out = ("recipe",) if is_common else ()
    averaged = [
        {key: value for key, value in part.items() if key not in left_out and value is not None}
        for part in parts
    ]
    return {"recipe": recipes[0] if is_common else None, "epochs_done": None, "averaged": averaged}


def _parts(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in record.get("averaged") or [] if isinstance(part, dict)]


def _selected_by(part: dict[str, Any]) -> str | None:
    """Return the metric that selected a part's epoch; older runs have a single rule."""
    if "mean_of" in part:
        return None
    return SELECTION_METRICS.get((part.get("recipe") or {}).get("selection", "validation-map"))
