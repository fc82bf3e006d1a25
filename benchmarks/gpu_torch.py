"""The student in torch on the card: eager, compiled and as a CUDA graph, by number format."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_card import macs_per_image, set_tf32
from benchmarks.gpu_findings import Finding, Report, Task, format_error
from benchmarks.gpu_student import FromPixels, make_random_student, random_images
from benchmarks.gpu_timing import DRY, TimingConfig, time_run
from sbtk_export.fp16 import make_half_trunk, make_half_trunk_student
from sbtk_runtime.preprocess import SIZE_PX

STAGE = "torch"
SOURCES = ("device", "pinned")

# The most informative batch sizes come first, in case time runs out.
_BATCHES = (32, 1, 128, 512, 8, 256, 64, 2, 16, 4)
_DRY_BATCHES = (2, 1)
_DRY_SIZE_PX = 64
# Smaller cosines mean a wrong embedding, not another number format: FP16 has 0.9998, and with
# random weights two images have about 0.97.
_LEAST_COSINE = 0.995
# Upper bound of compiling a ResNet50, for the first one.
_COMPILE_S = 60.0

#: Runs the network on the images in a tensor on the device.
Bound = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way of running the student.

    Attributes:
        name: name in the tables.
        peak: measured peak to compare its speed with.
        bind: given `(N, H, W, 3) uint8` on the device, returns a function that runs on this memory.
        is_slow_to_bind: whether it compiles for every batch size.
    """

    name: str
    peak: str
    bind: Callable[[Tensor], Bound]
    is_slow_to_bind: bool = False


def run(task: Task, report: Report) -> None:
    """Report every contender at every batch size, with images on the device and pinned."""
    batches = _DRY_BATCHES if task.is_dry_run else _BATCHES
    torch.backends.cudnn.benchmark = True
    set_tf32(False)
    contenders = make_contenders(task)
    quick = [contender for contender in contenders if not contender.is_slow_to_bind]
    slow = [contender for contender in contenders if contender.is_slow_to_bind]
    # First contenders that bind quickly, at all batch sizes, then those that compile.
    order = [(one, batch) for some in (quick, slow) for batch in batches for one in some]
    for contender, batch in order:
        for point in _points(contender, batch):
            report(point)
    bench = _Bench(task, contenders[0])
    with torch.inference_mode():
        for contender, batch in order:
            bench.measure(contender, batch, report)


def make_contenders(task: Task) -> list[Contender]:
    """Return the contenders; the first, FP32 without TF32, is the reference of the others."""
    student = make_random_student(task)
    half = copy.deepcopy(student)
    half.trunk = make_half_trunk(half.trunk)

    def on_device(of: nn.Module, layout: torch.memory_format) -> nn.Module:
        moved = copy.deepcopy(of).to(task.device, memory_format=layout)  # type: ignore[call-overload]
        return FromPixels(moved, layout).to(task.device).eval()

    plain = on_device(student, torch.contiguous_format)
    last = on_device(student, torch.channels_last)
    half_last = on_device(half, torch.channels_last)
    folded = on_device(make_half_trunk_student(student), torch.channels_last)
    compiled = _Compiled(folded, "aot_eager" if task.is_dry_run else "inductor")
    return [
        Contender("fp32 eager", "fp32", lambda images: _eager(plain, images)),
        Contender("tf32 eager", "tf32", lambda images: _eager(plain, images)),
        Contender("fp16 autocast eager", "fp16", lambda images: _autocast(last, images)),
        Contender("fp16 eager", "fp16", lambda images: _eager(half_last, images)),
        Contender("fp16 folded eager", "fp16", lambda images: _eager(folded, images)),
        Contender(
            "fp16 folded graph", "fp16", lambda images: _graph(_eager(folded, images), images)
        ),
        Contender("fp16 compiled", "fp16", compiled.bind, is_slow_to_bind=True),
        Contender(
            "fp16 compiled graph",
            "fp16",
            lambda images: _graph(compiled.bind(images), images),
            is_slow_to_bind=True,
        ),
    ]


class _Bench:
    """Binds contenders to batches, checks their rows and times them.

    Args:
        task: task of the stage.
        reference: contender whose rows are the reference.
    """

    def __init__(self, task: Task, reference: Contender) -> None:
        self._task = task
        self._reference = reference
        self._effort = DRY if task.is_dry_run else TimingConfig()
        self._size_px = _DRY_SIZE_PX if task.is_dry_run else SIZE_PX
        self._macs = macs_per_image(make_random_student(task), self._size_px)
        self._slow_s: list[float] = []
        self._expected: dict[int, Tensor] = {}

    def measure(self, contender: Contender, batch: int, report: Report) -> None:
        """Report a contender at a batch size from both sources, or the reason of failure."""
        points = _points(contender, batch)
        needed_s = 4 * (self._effort.warm_s + self._effort.measured_s)
        if contender.is_slow_to_bind and not self._task.is_dry_run:
            needed_s += 1.5 * max(self._slow_s, default=_COMPILE_S)
        if self._task.left_s < needed_s:
            for point in points:
                report(point.not_reached("the stage ran out of time"))
            return
        try:
            found = self._timings(contender, batch)
        # Compilers and cards without enough memory fail in many ways; continue with others.
        except Exception as problem:
            for point in points:
                report(point.failed(format_error(problem)))
        else:
            for point, figures in zip(points, found, strict=True):
                own = {"peak": contender.peak, "macs_per_image": self._macs}
                report(point.measured({**own, **figures}))
        set_tf32(False)
        if self._task.device == "cuda":
            torch.cuda.empty_cache()

    def _timings(self, contender: Contender, batch: int) -> list[dict[str, Any]]:
        """Return the results for images on the device and in pinned memory."""
        device = self._task.device
        images = torch.from_numpy(random_images(batch, self._size_px))
        host = images.pin_memory() if device == "cuda" else images
        if batch not in self._expected:
            set_tf32(False)
            self._expected[batch] = self._reference.bind(host.to(device))().clone()
        images = torch.zeros_like(images, device=device)
        set_tf32(contender.peak == "tf32")
        started = time.perf_counter()
        bound = contender.bind(images)
        # Bind to zeros first, to detect contenders that do not read their input again.
        images.copy_(host)
        cosine = _least_cosine(bound(), self._expected[batch])
        bind_s = time.perf_counter() - started
        if contender.is_slow_to_bind:
            self._slow_s.append(bind_s)
        if not cosine >= _LEAST_COSINE:
            raise ValueError(f"wrong rows: the smallest cosine to FP32 is {cosine}")
        common = {"least_cosine_to_fp32": cosine, "bind_s": bind_s}

        def with_copy() -> Tensor:
            images.copy_(host, non_blocking=True)
            return bound()

        runs: tuple[Bound, ...] = (bound, with_copy)
        return [common | time_run(one, device, batch, self._effort) for one in runs]


def _points(contender: Contender, batch: int) -> list[Finding]:
    return [Finding(STAGE, contender.name, source, batch) for source in SOURCES]


def _eager(module: nn.Module, images: Tensor) -> Bound:
    return lambda: module(images)


def _autocast(module: nn.Module, images: Tensor) -> Bound:
    def run() -> Tensor:
        with torch.autocast(images.device.type, torch.float16):
            return module(images)  # type: ignore[no-any-return]

    return run


class _Compiled:
    """A module compiled for one batch size at a time.

    Args:
        module: the module.
        backend: backend of `torch.compile`.
    """

    def __init__(self, module: nn.Module, backend: str) -> None:
        self._module = module
        self._backend = backend
        self._batch = 0
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def bind(self, images: Tensor) -> Bound:
        """Return a run on `images`, compiled unless the last call had the same batch size."""
        if self._compiled is None or self._batch != len(images):
            # Reset, since torch stops compiling after a number of shapes.
            torch._dynamo.reset()
            compiled: Callable[[Tensor], Tensor] = torch.compile(
                self._module, backend=self._backend, dynamic=False, fullgraph=True
            )
            compiled(images)
            self._compiled, self._batch = compiled, len(images)
        run = self._compiled
        return lambda: run(images)


def _graph(run: Bound, images: Tensor) -> Bound:
    """Capture a run as a CUDA graph after three ordinary runs, and return its replay."""
    if images.device.type != "cuda":
        raise RuntimeError("a CUDA graph needs a GPU")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = run()

    def replay() -> Tensor:
        graph.replay()
        return rows

    return replay


def _least_cosine(rows: Tensor, expected: Tensor) -> float:
    """Return the smallest cosine between rows of two `(N, D)` sets of unit rows."""
    return float((rows.float() * expected).sum(dim=1).min())
