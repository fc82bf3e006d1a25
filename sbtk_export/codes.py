"""The binary codes of a bundle: ITQ learnt on pictures of the training classes, and what it costs.

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

#: Pictures of each kind that codes are learnt on, if there are so many; a minute on two cores.
CODES_PER_KIND = 1000

_RULE = (
    "mAP@all (plain AP, mean over sketches, equal distances at their expected value) by Hamming "
    "distance, of {pictures}; ITQ learnt on {sketches:,} sketches and {photos:,} photos of "
    "training classes"
)


def require_bits(bits: Sequence[int], dim: int) -> None:
    """Makes sure, before any work, that codes of these lengths can be had.

    Raises:
        BadConfig: one is longer than an embedding, or no multiple of 8.
    """
    for length in bits:
        check_bits(length, dim)


def write_codes(
    bundle: Bundle,
    bits: Sequence[int],
    pictures: ExportImages,
    ranking: Embeddings,
    notify: Notify,
) -> dict[str, Any]:
    """Writes what makes codes of each length into a bundle's folder; returns how well they do.

    Args:
        bundle: with an FP32 model.
        bits: lengths, each at most the embedding's.
        pictures: with files to learn on.
        ranking: torch's embeddings of the pictures to rank, `(N, D) float32`.
        notify: called with what is under way.

    Returns:
        Figures for the manifest, by name.

    Raises:
        BadData: too few pictures can be read.
    """
    counts = {kind: len(files) for kind, files in pictures.code_files.items()}
    notify(f"codes: embedding {sum(counts.values()):,} pictures of training classes")
    rows, read = _embedded(bundle, pictures.code_files)
    figures: dict[str, Any] = {}
    for length in sorted(set(bits)):
        notify(f"codes: learning {length} bits")
        itq = fit_itq(rows, length)
        write_atomically(bundle.folder / itq_name(length), itq.to_bytes())
        rule = _RULE.format(
            pictures=_named(pictures), sketches=read["sketch"], photos=read["photo"]
        )
        figures[f"codes_{length}_map"] = {
            "value": _map(itq.codes(ranking), pictures.ranking),
            "of_embeddings": _map(ranking, pictures.ranking),
            "rule": rule,
        }
    return figures


def _embedded(
    bundle: Bundle, files: Mapping[Kind, Sequence[Path]]
) -> tuple[Embeddings, dict[Kind, int]]:
    """Returns the embeddings of all readable files, and how many of each kind there are."""
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
        raise BadData("no picture for binary codes can be read", "images of training classes")
    return np.stack(rows), read


def _named(pictures: ExportImages) -> str:
    if pictures.ranking is pictures.parity:
        return "pictures of training classes"
    return "pictures of validation classes"


def _map(rows: Any, pictures: ImageSubset) -> float:
    """Returns mAP@all of embeddings `(N, D) float32` or codes `(N, W) uint8`."""
    is_sketch, labels = pictures.is_sketch, pictures.labels
    found = evaluate(
        *(rows[is_sketch], labels[is_sketch], rows[~is_sketch], labels[~is_sketch]),
        distance="hamming" if rows.dtype == np.uint8 else "cosine",
        ties="expected",
    )
    return float(found.ap_all.mean())
