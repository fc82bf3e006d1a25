"""Made-up results in the format of `sbtk bench map --json` and `sbtk train --ablation`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sbtk_runtime.evaluation.protocol import Protocol

METRICS = {
    "mAP@all": 0.5,
    "mAP@all (VOC)": 0.51,
    "mAP@200 (strict)": 0.42,
    "mAP@200 (lenient)": 0.63,
    "P@100": 0.4,
    "P@200": 0.3333,
}


def report(
    rules: Protocol | None,
    *,
    of: str = "21 unseen classes of SK-YE",
    precision: str = "int8",
    dim: int | None = None,
) -> dict[str, Any]:
    """Return one measurement, or without rules, one in the oldest format."""
    words = "" if rules is None else rules.setting_words
    classes = f"{of} ({words})" if words else of
    found: dict[str, Any] = {
        "model_id": "student@0123",
        "precision": precision,
        "protocol": f"{classes}: 525 sketches against 530 photos; cosine of unit embeddings",
        "figures": dict(METRICS),
        "class_map": {"cow": 0.75, "windmill": 0.25},
        "queries": 525,
        "photos": 530,
    }
    if rules is not None:
        found["rules"] = rules.to_json()
    return found if dim is None else found | {"dim": dim}


def write_results(path: Path, *reports: dict[str, Any]) -> Path:
    """Write measurements to `path` and return it."""
    path.write_text(json.dumps({"machine": {}, "map": list(reports)}))
    return path


def write_ablation(path: Path, values: dict[str, list[float]], classes: str = "validation") -> Path:
    """Write mAP@all of each row and seed to `path` and return it."""
    lines = ["row,seed,epochs,classes,figure,value"]
    for row, found in values.items():
        lines += [f"{row},{seed},3,{classes},mAP@all,{value}" for seed, value in enumerate(found)]
    path.write_text("\n".join(lines) + "\n")
    return path
