"""Binary codes of a bundle: ITQ fitted on images of the training classes, and what it costs.

It is fitted on the FP32 embeddings of the runtime's own engine, of sketches and photos in equal
parts, since a code must serve both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbtk_export.images import ExportImages
from sbtk_export.parity import mean_average_precision
from sbtk_runtime.binary_codes import fit_itq
from sbtk_runtime.bundle import Bundle, itq_name
from sbtk_runtime.embedding.embedder import Embedded, Embedder
from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.metrics import Embeddings
from sbtk_runtime.files import write_atomically
from sbtk_runtime.preprocess import Kind
from sbtk_train.progress import Notify

#: Most images of each kind to fit codes on; they take a minute on two cores.
CODES_PER_KIND = 1000

_RULE = (
    "mAP@all (plain AP, mean over sketches, equal distances at their expected value) by Hamming "
    "distance, of {images}; ITQ learnt on {sketches:,} sketches and {photos:,} photos of "
    "training classes"
)


def write_codes(
    bundle: Bundle,
    bits: Sequence[int],
    samples: ExportImages,
    ranking: Embeddings,
    notify: Notify,
) -> dict[str, Any]:
    """Fit binary codes of each length, write them into a bundle, and return their metrics.

    Args:
        bundle: a bundle with an FP32 model.
        bits: lengths, each at most the embedding's.
        samples: names the files to fit the codes on.
        ranking: torch's embeddings of the images to rank, `(N, D) float32`.
        notify: called with progress messages.

    Returns:
        Metrics for the manifest, by name.

    Raises:
        BadData: too few images can be read.
    """
    counts = {kind: len(files) for kind, files in samples.code_files.items()}
    notify(f"codes: embedding {sum(counts.values()):,} images of training classes")
    rows, read = _embedded(bundle, samples.code_files)
    of = "validation" if samples.ranks_validation else "training"
    images = f"images of {of} classes"
    rule = _RULE.format(images=images, sketches=read["sketch"], photos=read["photo"])
    metrics: dict[str, Any] = {}
    for length in sorted(set(bits)):
        notify(f"codes: learning {length} bits")
        itq = fit_itq(rows, length)
        write_atomically(bundle.folder / itq_name(length), itq.to_bytes())
        metrics[f"codes_{length}_map"] = {
            "value": mean_average_precision(
                itq.codes(ranking), samples.ranking, distance="hamming", ties="expected"
            ),
            "of_embeddings": mean_average_precision(ranking, samples.ranking, ties="expected"),
            "rule": rule,
        }
    return metrics


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
