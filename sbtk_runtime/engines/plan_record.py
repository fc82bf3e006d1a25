"""What is known about a cached TensorRT plan: its sidecar, read as if anybody had written it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from sbtk_runtime.engines.plan_build import BuildSettings
from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_runtime.manifest import PRECISIONS, Precision

PLAN_FORMAT = 1

#: The device of a plan that was built without a GPU; it fits any that its module supports.
NO_DEVICE = "none"

_HEX64 = re.compile(r"[0-9a-f]{64}")
_MAX_TEXT = 200


@dataclass(frozen=True)
class PlanRecord:
    """A plan's sidecar: what it was built from, by what, for what machine.

    Attributes:
        model_id: of the bundle.
        onnx_sha256: of the ONNX file that the plan was built from.
        precision: of that file.
        module: `tensorrt` or `tensorrt_rtx`.
        version: of that module; no other may load the plan.
        device: name of the GPU that it was built on, or `none`.
        compute_capability: of that GPU, such as `9.0`; empty without one.
        settings: batches, memory and effort of the build.
        plan_sha256: of the plan.
        plan_bytes: its size.
        created: when, UTC, ISO 8601.
        build_s: seconds that the build took.
        sbtk_version: of the sbtk that built it.
        format: of this record.
    """

    model_id: str
    onnx_sha256: str
    precision: Precision
    module: str
    version: str
    device: str
    compute_capability: str
    settings: BuildSettings
    plan_sha256: str
    plan_bytes: int
    created: str
    build_s: float
    sbtk_version: str
    format: int = PLAN_FORMAT

    @property
    def batch_max(self) -> int:
        """The largest batch that the plan takes."""
        return self.settings.batch_max

    def to_json(self) -> bytes:
        """Returns the sidecar's content."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Returns the record in a sidecar.

        Raises:
            BadModel: it is not JSON, of a newer format, or a field is missing, odd or unknown.
        """
        try:
            value = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as problem:
            raise BadModel("its sidecar is not JSON") from problem
        if not isinstance(value, dict):
            raise BadModel("its sidecar is not a JSON object")
        found = value.get("format")
        if type(found) is not int or found < 1:
            raise BadModel("its sidecar has no format number")
        if found > PLAN_FORMAT:
            raise BadModel(f"its sidecar has format {found}, made by a newer sbtk")
        _check_fields(cls, value)
        settings = value["settings"]
        _check_fields(BuildSettings, settings)
        try:
            record = cls(**{**value, "settings": BuildSettings(**settings)})
        except BadConfig as problem:
            raise BadModel(f"its sidecar names {problem.found}") from problem
        is_sound = (
            _HEX64.fullmatch(record.onnx_sha256)
            and _HEX64.fullmatch(record.plan_sha256)
            and record.precision in PRECISIONS
            and record.plan_bytes > 0
        )
        if not is_sound:
            raise BadModel("its sidecar has a hash, precision or size that cannot be")
        return record

    def misfit(self, module: str, version: str, device: str, compute_capability: str) -> str:
        """Returns why that TensorRT on that GPU may not load the plan; empty when it may.

        Args:
            module: `tensorrt` or `tensorrt_rtx`.
            version: of that module.
            device: name of the GPU, or `none`.
            compute_capability: of the GPU; empty without one.
        """
        if (self.module, self.version) != (module, version):
            return f"it was built by {self.module} {self.version}; this is {module} {version}"
        if self.device == NO_DEVICE:
            return ""
        if (self.device, self.compute_capability) != (device, compute_capability):
            here = (
                f"this is {device} ({compute_capability})" if compute_capability else "none is here"
            )
            return f"it was built on {self.device} ({self.compute_capability}); {here}"
        return ""


@dataclass(frozen=True)
class PlanWanted:
    """The plan that is looked for.

    Attributes:
        onnx_sha256: of the ONNX file.
        precision: of that file.
        module: `tensorrt` or `tensorrt_rtx`.
        version: of that module.
        device: name of the GPU that is to run it, or `none`.
        compute_capability: of that GPU; empty without one.
        batch: a plan for as many images at once is preferred.
        settings: of the build; any will do when it is `None`.
    """

    onnx_sha256: str
    precision: Precision
    module: str
    version: str
    device: str
    compute_capability: str
    batch: int = 1
    settings: BuildSettings | None = None

    def concerns(self, record: PlanRecord) -> bool:
        """Returns whether a plan is of this model and module, and built in this way."""
        return (
            record.onnx_sha256 == self.onnx_sha256
            and record.precision == self.precision
            and record.module == self.module
            and self.settings in (None, record.settings)
        )

    def misfit(self, record: PlanRecord) -> str:
        """Returns why this TensorRT on this GPU may not load a plan; empty when it may."""
        return record.misfit(self.module, self.version, self.device, self.compute_capability)

    def preference(self, record: PlanRecord) -> tuple[bool, int]:
        """Sorts plans: those that take the batch at once, smallest first; then others, largest."""
        is_too_small = record.batch_max < self.batch
        return is_too_small, -record.batch_max if is_too_small else record.batch_max


def _check_fields(kind: type[Any], value: Any) -> None:
    """Checks that a JSON value has exactly the fields of a dataclass, each of its type."""
    types = {field.name: str(field.type) for field in fields(kind)}
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise BadModel(f"its sidecar has not the fields of a {kind.__name__}")
    for name, type_name in types.items():
        found = value[name]
        if type_name in ("str", "Precision"):
            fits = isinstance(found, str) and len(found) <= _MAX_TEXT and found.isprintable()
        elif type_name == "int":
            fits = type(found) is int and 0 <= found < 1 << 63
        elif type_name == "float":
            fits = type(found) in (int, float) and 0 <= found < 1e9
        else:
            fits = isinstance(found, dict)
        if not fits:
            raise BadModel(f"its sidecar has an odd {name}")
