"""The bundle for the engines: random weights, and reference rows."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_findings import Finding, Report, Task, attempt
from benchmarks.gpu_student import FromPixels, make_random_student, random_images
from sbtk_runtime.errors import MissingExtra
from sbtk_runtime.manifest import BundleManifest
from sbtk_runtime.preprocess import PREPROCESSING
from sbtk_train.models.student import Student

_STAGE = "model"
_IMAGES = 8


def run(task: Task, report: Report) -> None:
    """Make the run's bundle in its scratch folder: FP16, and INT8 if TensorRT is installed."""
    points = {name: Finding(_STAGE, name) for name in ("fp16", "int8 for TensorRT")}
    if task.model is not None:
        report(Finding(_STAGE, "bundle").measured({"given": task.model}))
        return
    for point in points.values():
        report(point)
    student = make_random_student(task)
    folder = bundle_folder(task)
    folder.mkdir()
    if attempt(report, points["fp16"], lambda: _fp16(student, folder)):
        _sign(folder, student)
        np.savez(
            reference_file(task),
            images=random_images(_IMAGES),
            rows=_rows(student, _IMAGES),
        )
    point = points["int8 for TensorRT"]
    if task.is_dry_run:
        report(point.not_reached("skipped in a dry run, where it would take longest"))
    elif not any(map(importlib.util.find_spec, ("tensorrt", "tensorrt_rtx"))):
        report(point.not_reached("skipped: no engine that runs it is installed"))
    elif attempt(report, point, lambda: _int8(student, folder)):
        _sign(folder, student)


def bundle_folder(task: Task) -> Path:
    """Return the path of the run's own bundle."""
    return task.scratch / "bundle"


def reference_file(task: Task) -> Path:
    """Return where the own bundle's `images` and torch's FP32 `rows` for them are."""
    return task.scratch / "reference.npz"


def _fp16(student: Student, folder: Path) -> dict[str, Any]:
    _require_onnx()
    from sbtk_export.fp16 import make_half_trunk_student
    from sbtk_export.onnx_graph import write_onnx

    started = time.perf_counter()
    write_onnx(make_half_trunk_student(student), folder / "model.fp16.onnx")
    return {"seconds": time.perf_counter() - started}


def _int8(student: Student, folder: Path) -> dict[str, Any]:
    _require_onnx()
    from sbtk_export.int8_tensorrt import quantise_for_tensorrt
    from sbtk_export.onnx_graph import ModelInputs, write_onnx

    started = time.perf_counter()
    source = folder / "model.fp32.onnx"
    write_onnx(student, source)
    inputs = ModelInputs.of_kind(random_images(16, seed=1), "photo")
    quantise_for_tensorrt(source, folder / "model.int8.trt.onnx", inputs)
    return {"seconds": time.perf_counter() - started}


def _require_onnx() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise MissingExtra(
            "onnx or onnxscript is not installed",
            "both, or --model BUNDLE",
            'pip install "sbtk[export]"',
        )


def _sign(folder: Path, student: Student) -> None:
    """Write a manifest with the hashes of all files in the folder."""
    from sbtk_export.export import hash_files

    files = hash_files(folder)
    joined = "".join(record.sha256 for record in files.values())
    BundleManifest(
        name="random-weights",
        model_id=f"random-weights@{hashlib.sha256(joined.encode()).hexdigest()[:12]}",
        method="sbtknet",
        backbone="resnet50-v1",
        dim=student.dim,
        preprocessing=PREPROCESSING,
        files=files,
        training={"data": "none: random weights, only for speed"},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    ).write(folder)


def _rows(student: Student, count: int) -> Any:
    with torch.inference_mode():
        images = torch.from_numpy(random_images(count))
        return FromPixels(student, torch.contiguous_format)(images).numpy()
