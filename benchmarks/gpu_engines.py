"""sbtk's engines on a GPU: availability, and speed from NumPy to NumPy."""

from __future__ import annotations

import statistics
import time
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_findings import Figures, Finding, Report, Task, attempt, format_error
from benchmarks.gpu_timing import DRY, TimingConfig, time_by_clock
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import Engine, EngineOptions
from sbtk_runtime.engines.registry import open_engine, probe_engines
from sbtk_runtime.engines.session import validate_embeddings
from sbtk_runtime.errors import BadModel
from sbtk_runtime.evaluation.bench.floor import count_macs
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import Kind

STAGE = "engines"
_SURVEY = "survey"
_SOURCE = "host"
#: Larger batches are split, so that one part is copied while another is computed.
LARGEST_PART = 128
_BATCHES = (32, 1, 128, 256, 8, 512, 64, 2, 16, 4)
_DRY_BATCHES = (2, 1)
_PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "tensorrt": ("fp16", "int8"),
    "tensorrt-rtx": ("fp16", "int8"),
}
_LEAST_COSINE = 0.9
_TIMED_RUNS = 20


def run(task: Task, report: Report) -> None:
    """Report the availability of all engines, or the speed of the engine that the stage names."""
    if task.stage == _SURVEY:
        _survey(report)
        return
    name = task.stage.removeprefix("engine ")
    precisions = _PRECISIONS.get(name, ("fp16",))
    for precision in precisions:
        for point in (_opening(name, precision), *_points(task, name, precision)):
            report(point)
    for precision in precisions:
        _measure(task, name, precision, report)


class _Timed(Protocol):
    """An engine that measures the time of a run on the GPU."""

    def run_timed(
        self, images: NDArray[np.uint8], kind: Kind
    ) -> tuple[NDArray[np.float32], Any]: ...


def _survey(report: Report) -> None:
    for found in probe_engines():
        point = Finding(_SURVEY, found.name)
        version = {"version": found.version}
        if found.works:
            report(point.measured(version))
        else:
            report(Finding(_SURVEY, found.name, figures=version).failed(found.reason))


def _opening(name: str, precision: Precision) -> Finding:
    return Finding(STAGE, f"{name} {precision}", "opening")


def _points(task: Task, name: str, precision: Precision) -> list[Finding]:
    batches = _DRY_BATCHES if task.is_dry_run else _BATCHES
    return [Finding(STAGE, f"{name} {precision}", _SOURCE, batch) for batch in batches]


def _measure(task: Task, name: str, precision: Precision, report: Report) -> None:
    """Report an engine in one precision, or the reason why it does not open."""
    points = _points(task, name, precision)
    opening = _opening(name, precision)
    notices: list[str] = []
    started = time.perf_counter()
    try:
        bundle = _bundle(task)
        options = EngineOptions(engine=name, precision=precision, batch=LARGEST_PART)
        engine = open_engine(bundle, options, notify=notices.append)
    # Record other exceptions of libraries too.
    except Exception as problem:
        for point in (opening, *points):
            report(point.failed("\n".join([format_error(problem), *notices])))
        return
    try:
        open_s = time.perf_counter() - started
        facts = {"open_s": open_s, "version": engine.info.version, "device": engine.info.device}
        said = {"said": notices} if notices else {}
        if not attempt(report, opening, lambda: facts | said | _agreement(task, engine)):
            for point in points:
                report(point.failed(f"{name} {precision} computes wrong rows"))
            return
        macs = count_macs(bundle.read_onnx(precision, engine.info.form))
        for point in points:
            _measure_batch(task, engine, point, precision, macs, report)
    finally:
        engine.close()


def _measure_batch(
    task: Task, engine: Engine, point: Finding, precision: Precision, macs: int, report: Report
) -> None:
    effort = DRY if task.is_dry_run else TimingConfig(warm_s=0.3, measured_s=0.8)
    if task.left_s < 3 * (effort.warm_s + effort.measured_s):
        report(point.not_reached("the stage ran out of time"))
        return
    images = _images(point.batch)

    def measure() -> Figures:
        figures = time_by_clock(lambda: engine.run(images, "photo"), point.batch, effort)
        own = {"peak": precision, "macs_per_image": macs}
        return {**own, **figures, **_device_times(engine, images)}

    attempt(report, point, measure)


def _device_times(engine: Engine, images: NDArray[np.uint8]) -> dict[str, float]:
    """Return the medians of copying and computing, if the engine measures them."""
    if not hasattr(engine, "run_timed"):
        return {}
    runs = [cast(_Timed, engine).run_timed(images, "photo")[1] for _ in range(_TIMED_RUNS)]
    return {
        name: statistics.median(getattr(one, name) for one in runs)
        for name in ("h2d_ms", "compute_ms", "d2h_ms")
    }


def _agreement(task: Task, engine: Engine) -> dict[str, float]:
    """Return the smallest cosine to torch's FP32 rows; without these, check the rows' lengths."""
    from benchmarks.gpu_model import reference_file

    if task.model is None and reference_file(task).is_file():
        with np.load(reference_file(task)) as reference:
            images, expected = reference["images"], reference["rows"]
        cosines = _sound(engine.run(images, "photo")) @ expected.T
        cosine = float(cosines.diagonal().min())
        is_own = cosines.argmax(axis=1) == np.arange(len(expected))
        if cosine < _LEAST_COSINE or not is_own.all():
            raise BadModel(
                f"the smallest cosine to torch is {cosine}, and {int(is_own.sum())} of "
                f"{len(expected)} rows are closest to their own image's",
                f"at least {_LEAST_COSINE}, and all rows",
            )
        return {"least_cosine_to_fp32": cosine}
    _sound(engine.run(_images(2), "photo"))
    return {}


def _sound(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    rows, is_bad = validate_embeddings(rows)
    if is_bad.any():
        raise BadModel(f"{int(is_bad.sum())} of {len(rows)} rows are not unit rows")
    return rows


def _bundle(task: Task) -> Bundle:
    """Return the given bundle, else the run's own, else the one included in sbtk."""
    folder = task.scratch / "bundle"
    own = folder if (folder / "manifest.json").is_file() else None
    return Bundle.open(task.model if task.model is not None else own)


def _images(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), np.uint8)
