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
from benchmarks.gpu_findings import Finding, Report, Task, told
from benchmarks.gpu_student import FromPixels, random_pictures, random_student
from benchmarks.gpu_timing import DRY, Effort, timed
from sbtk_export.fp16 import half_trunk, half_trunk_student
from sbtk_runtime.preprocess import SIZE_PX

STAGE = "torch"
SOURCES = ("device", "pinned")

# The batches that tell most come first: what time does not suffice for is left out.
_BATCHES = (32, 1, 128, 512, 8, 256, 64, 2, 16, 4)
_DRY_BATCHES = (2, 1)
_DRY_SIZE_PX = 64
# Below this, rows are not the same embedding in another number format but a wrong one: FP16 has
# 0.9998, and with random weights two pictures have some 0.97.
_LEAST_COSINE = 0.995
# A compiled ResNet50 was never seen to take longer; before the first there is nothing to go by.
_COMPILE_S = 60.0

#: Runs the network on the pictures that lie in a tensor on the device.
Bound = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way of running the student.

    Attributes:
        name: as the tables have it.
        peak: the measured peak that its speed is a share of.
        bind: given `(N, H, W, 3) uint8` on the device, returns what runs on that very memory.
        is_slow_to_bind: it compiles, for every batch anew.
    """

    name: str
    peak: str
    bind: Callable[[Tensor], Bound]
    is_slow_to_bind: bool = False


def run(task: Task, report: Report) -> None:
    """Reports every contender at every batch, its pictures on the device and in pinned memory."""
    batches = _DRY_BATCHES if task.is_dry_run else _BATCHES
    torch.backends.cudnn.benchmark = True
    set_tf32(False)
    contenders = make_contenders(task)
    quick = [contender for contender in contenders if not contender.is_slow_to_bind]
    slow = [contender for contender in contenders if contender.is_slow_to_bind]
    # For each batch all that bind quickly, then for each batch those that compile.
    order = [(one, batch) for some in (quick, slow) for batch in batches for one in some]
    for contender, batch in order:
        for point in _points(contender, batch):
            report(point)
    bench = _Bench(task, contenders[0])
    with torch.inference_mode():
        for contender, batch in order:
            bench.measure(contender, batch, report)


def make_contenders(task: Task) -> list[Contender]:
    """Return the contenders; the first is FP32 without TF32, which the others are checked by."""
    student = random_student(task)
    half = copy.deepcopy(student)
    half.trunk = half_trunk(half.trunk)

    def on_device(of: nn.Module, layout: torch.memory_format) -> nn.Module:
        moved = copy.deepcopy(of).to(task.device, memory_format=layout)  # type: ignore[call-overload]
        return FromPixels(moved, layout).to(task.device).eval()

    plain = on_device(student, torch.contiguous_format)
    last = on_device(student, torch.channels_last)
    half_last = on_device(half, torch.channels_last)
    folded = on_device(half_trunk_student(student), torch.channels_last)
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
        task: of the stage.
        reference: the contender that the others' rows are compared with.
    """

    def __init__(self, task: Task, reference: Contender) -> None:
        self._task = task
        self._reference = reference
        self._effort = DRY if task.is_dry_run else Effort()
        self._size_px = _DRY_SIZE_PX if task.is_dry_run else SIZE_PX
        self._macs = macs_per_image(random_student(task), self._size_px)
        self._slow_s: list[float] = []
        self._expected: dict[int, Tensor] = {}

    def measure(self, contender: Contender, batch: int, report: Report) -> None:
        """Reports a contender at a batch from both sources, or why not."""
        points = _points(contender, batch)
        needed_s = 4 * (self._effort.warm_s + self._effort.measured_s)
        if contender.is_slow_to_bind and not self._task.is_dry_run:
            needed_s += 1.5 * max(self._slow_s, default=_COMPILE_S)
        if self._task.left_s < needed_s:
            for point in points:
                report(point.not_reached("the stage's time was over"))
            return
        try:
            found = self._timings(contender, batch)
        # A compiler or a card without enough memory fails in many ways; others go on.
        except Exception as problem:
            for point in points:
                report(point.failed(told(problem)))
        else:
            for point, figures in zip(points, found, strict=True):
                own = {"peak": contender.peak, "macs_per_image": self._macs}
                report(point.measured({**own, **figures}))
        set_tf32(False)
        if self._task.device == "cuda":
            torch.cuda.empty_cache()

    def _timings(self, contender: Contender, batch: int) -> list[dict[str, Any]]:
        """Return the figures for pictures on the device and from pinned memory."""
        device = self._task.device
        pictures = torch.from_numpy(random_pictures(batch, self._size_px))
        host = pictures.pin_memory() if device == "cuda" else pictures
        if batch not in self._expected:
            set_tf32(False)
            self._expected[batch] = self._reference.bind(host.to(device))().clone()
        images = torch.zeros_like(pictures, device=device)
        set_tf32(contender.peak == "tf32")
        started = time.perf_counter()
        bound = contender.bind(images)
        # Bound to zeros: only what reads its input anew gets the pictures' rows right.
        images.copy_(host)
        cosine = _least_cosine(bound(), self._expected[batch])
        bind_s = time.perf_counter() - started
        if contender.is_slow_to_bind:
            self._slow_s.append(bind_s)
        if not cosine >= _LEAST_COSINE:
            raise ValueError(f"wrong rows: the least cosine to FP32 is {cosine}")
        common = {"least_cosine_to_fp32": cosine, "bind_s": bind_s}

        def with_copy() -> Tensor:
            images.copy_(host, non_blocking=True)
            return bound()

        runs: tuple[Bound, ...] = (bound, with_copy)
        return [common | timed(one, device, batch, self._effort) for one in runs]


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
    """A module compiled for one batch at a time.

    Args:
        module: to compile.
        backend: of `torch.compile`.
    """

    def __init__(self, module: nn.Module, backend: str) -> None:
        self._module = module
        self._backend = backend
        self._batch = 0
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def bind(self, images: Tensor) -> Bound:
        """Return the run on `images`, compiled unless the last call was for the same batch."""
        if self._compiled is None or self._batch != len(images):
            # Another batch is another shape; added up, torch would stop compiling after some.
            torch._dynamo.reset()
            compiled: Callable[[Tensor], Tensor] = torch.compile(
                self._module, backend=self._backend, dynamic=False, fullgraph=True
            )
            compiled(images)
            self._compiled, self._batch = compiled, len(images)
        run = self._compiled
        return lambda: run(images)


def _graph(run: Bound, images: Tensor) -> Bound:
    """Return the replay of a run, captured as one CUDA graph after three ordinary runs."""
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
