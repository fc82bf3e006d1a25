"""The model card: the bundle's manifest in words, so that the two cannot disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sbtk_runtime.bundle import code_lengths
from sbtk_runtime.manifest import BundleManifest
from sbtk_runtime.onnx_file import INPUT_NAME
from sbtk_runtime.preprocess import SIZE_PX

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
Finding photos of a thing from a drawing of it, on one's own machine: the model puts sketches and
photos into one space, where the photos nearest to a sketch are the answer. Photos can be found
from photos in the same way."""

_LIMITS = """\
- It knows what a thing is, less how it is drawn: of several photos of horses it does not reliably
  find the one horse that was traced.
- Scenes, text, faces of particular people and small things at the edge of a picture are outside
  what it was trained on. It must not be used to identify persons.
- Classes far from its training classes are found less well; the figures above say how much for
  the classes that they name.
- Scores are cosines. They rank photos for one sketch and are no probabilities."""


def model_card(manifest: BundleManifest) -> str:
    """Returns the model card in Markdown; everything in it comes from the manifest."""
    training = dict(manifest.training)
    licence = training.pop("licence", "not known")
    parts = [
        f"# {manifest.name}",
        f"A {manifest.backbone} student trained by {manifest.method}, {manifest.dim} dimensions, "
        f"exported on {manifest.created[:10]}. Model id `{manifest.model_id}`.",
        _section("Intended use", _USE),
        _section("Input", _input_text(manifest)),
        _section("Licence", str(licence)),
        _section("Training", _bullets(training)),
        _section("Metrics", _bullets(manifest.metrics) if manifest.metrics else "None recorded."),
        _section("Parity with torch", _parity_text(manifest.parity)),
        *_codes_sections(manifest),
        _section("Limits", _LIMITS),
        _section("Files", _files_text(manifest)),
        _section("Versions", _bullets(manifest.versions)),
    ]
    return "\n\n".join(parts) + "\n"


def _codes_sections(manifest: BundleManifest) -> list[str]:
    bits = code_lengths(manifest)
    if not bits:
        return []
    options = " or ".join(f"`--bits {length}`" for length in bits)
    text = (
        f"`sbtk index` and `sbtk embed` make binary codes of the embeddings with {options}: ITQ "
        "(Gong and Lazebnik 2011), compared by Hamming distance. The metrics above say what they "
        "lose."
    )
    return [_section("Binary codes", text)]


def _input_text(manifest: BundleManifest) -> str:
    """Returns what an engine gives the model."""
    text = (
        f"`{INPUT_NAME} (N, {SIZE_PX}, {SIZE_PX}, 3) uint8`: RGB, prepared as "
        f"`{manifest.preprocessing}` says (in words: "
        "PREPROCESSING.md); scaling, mean and standard deviation are inside."
    )
    if manifest.domain_input is None:
        return f"{text} The model is not told whether a picture is a sketch or a photo."
    return (
        f"{text} `{manifest.domain_input} (N,) float32`: 0 for a sketch, 1 for a photo; the same "
        "pixels have other embeddings as the one than as the other."
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
            lines.append(f"{indent}- {label}: {_value_text(value)}")
    return "\n".join(lines)


def _value_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _parity_text(parity: Mapping[str, Any]) -> str:
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
        "Each file was run by sbtk's own engine beside torch in FP32, on the same pixels of seen "
        "classes, sketches and photos in equal parts, none of them used for calibration. Norms are "
        "of the rows as the model gives them. mAP@all is plain AP, mean over sketches." + same_sums
    )


def _files_text(manifest: BundleManifest) -> str:
    rows = [
        f"- `{name}`: {record.size_bytes:,} bytes, SHA-256 `{record.sha256}`"
        for name, record in manifest.files.items()
    ]
    return "\n".join(rows)
