"""The binary codes of a bundle: ITQ fitted on images of the training classes, and its loss.

It is learnt on the embeddings that users get, by the runtime's own engine at FP32, of sketches and
photos in equal parts: a code must serve both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbtk_export.images import ExportImages, ImageSubset
from sbtk_runtime.binary_codes import check_bits, fit_itq
from sbtk_runtime.bundle import Bundle, itq_name
from sbtk_runtime.embedding.embedder import Embedded, Embedder
from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.metrics import Embeddings, evaluate
from sbtk_runtime.files import write_atomically
from sbtk_runtime.preprocess import Kind
from sbtk_train.progress import Notify

#: Images of each kind that codes are learnt on, if there are so many; a minute on two cores.
CODES_PER_KIND = 1000

_RULE = (
    "mAP@all (plain AP, mean over sketches, equal distances at their expected value) by Hamming "
    "distance, of {images}; ITQ learnt on {sketches:,} sketches and {photos:,} photos of "
    "training classes"
)


def require_bits(bits: Sequence[int], dim: int) -> None:
    """Refuse lengths that no codes can have, before any work.

    Raises:
        BadConfig: one is longer than an embedding, or no multiple of 8.
    """
    for length in bits:
        check_bits(length, dim)


def write_codes(
    bundle: Bundle,
    bits: Sequence[int],
    samples: ExportImages,
    ranking: Embeddings,
    notify: Notify,
) -> dict[str, Any]:
    """Fit binary codes of each length, write them into a bundle, and return their metrics.

    Args:
        bundle: with an FP32 model.
        bits: lengths, each at most the embedding's.
        samples: has the files to fit the codes on.
        ranking: torch's embeddings of the images to rank, `(N, D) float32`.
        notify: called with progress messages.

    Returns:
        Figures for the manifest, by name.

    Raises:
        BadData: too few images can be read.
    """
    counts = {kind: len(files) for kind, files in samples.code_files.items()}
    notify(f"codes: embedding {sum(counts.values()):,} images of training classes")
    rows, read = _embedded(bundle, samples.code_files)
    figures: dict[str, Any] = {}
    for length in sorted(set(bits)):
        notify(f"codes: learning {length} bits")
        itq = fit_itq(rows, length)
        write_atomically(bundle.folder / itq_name(length), itq.to_bytes())
        rule = _RULE.format(
            images=_describe_images(samples), sketches=read["sketch"], photos=read["photo"]
        )
        figures[f"codes_{length}_map"] = {
            "value": _map(itq.codes(ranking), samples.ranking),
            "of_embeddings": _map(ranking, samples.ranking),
            "rule": rule,
        }
    return figures


def _embedded(
    bundle: Bundle, files: Mapping[Kind, Sequence[Path]]
) -> tuple[Embeddings, dict[Kind, int]]:
    """Return the embeddings of all readable files, and how many of each kind there are."""
    rows: list[Embeddings] = []
    read: dict[Kind, int] = {}
    with Embedder(bundle, engine="onnxruntime", precision="fp32", device="cpu") as embedder:
        for kind, paths in files.items():
            before = len(rows)
            rows += [
                item.row for item in embedder.stream(paths, kind) if isinstance(item, Embedded)
            ]
            read[kind] = len(rows) - before
    if not rows:
        raise BadData("no image for binary codes can be read", "images of training classes")
    return np.stack(rows), read


def _describe_images(samples: ExportImages) -> str:
    if samples.ranking is samples.parity:
        return "images of training classes"
    return "images of validation classes"


def _map(rows: Any, samples: ImageSubset) -> float:
    """Return mAP@all of embeddings `(N, D) float32` or codes `(N, W) uint8`."""
    is_sketch, labels = samples.is_sketch, samples.labels
    found = evaluate(
        *(rows[is_sketch], labels[is_sketch], rows[~is_sketch], labels[~is_sketch]),
        distance="hamming" if rows.dtype == np.uint8 else "cosine",
        ties="expected",
    )
    return float(found.ap_all.mean())
