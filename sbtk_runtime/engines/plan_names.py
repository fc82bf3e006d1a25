"""What the files in the cache of plans are called: for people to read, and never twice the same."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict

from sbtk_runtime.engines.plan_record import PlanRecord

PLAN, SIDECAR, TIMING = ".plan", ".json", ".timing"

_HASH_DIGITS = 12


def sidecar_name(record: PlanRecord) -> str:
    """Returns the sidecar's name, which differs for everything that makes another plan."""
    key = [record.onnx_sha256, record.device, asdict(record.settings)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    parts = (
        model_name(record.model_id),
        record.precision,
        f"{record.module}-{record.version}",
        f"sm{record.compute_capability}" if record.compute_capability else "any",
        f"b{record.batch_max}",
        digest[:_HASH_DIGITS],
    )
    return "-".join(_as_file_name(part) for part in parts) + SIDECAR


def plan_name(sidecar: str, record: PlanRecord) -> str:
    """Returns the name of the plan that belongs to a sidecar.

    With its hash in its name, a new plan never takes the place of one that is being read.
    """
    return f"{sidecar.removesuffix(SIDECAR)}.{record.plan_sha256[:_HASH_DIGITS]}{PLAN}"


def sidecar_of(plan: str) -> str:
    """Returns the name of the sidecar that a plan of that name belongs to."""
    return plan[: -len(PLAN) - _HASH_DIGITS - 1] + SIDECAR


def timing_name(module: str, version: str, compute_capability: str) -> str:
    """Returns the name of what builds measured on such a GPU."""
    return _as_file_name(f"{module}-{version}-sm{compute_capability}") + TIMING


def model_name(model_id: str) -> str:
    """Returns the part of a model id that people gave it."""
    return model_id.partition("@")[0]


def _as_file_name(text: str) -> str:
    # No leading dot, which would hide the file, whatever the model is called.
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[:60].lstrip(".") or "_"
