"""The card, its measured peaks, and the network's multiply-accumulates."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_findings import Finding, Report, Task, attempt
from benchmarks.gpu_student import make_random_student
from benchmarks.gpu_timing import DRY, TimingConfig, time_run
from sbtk_runtime.machine import DISTRIBUTIONS, installed_versions
from sbtk_runtime.preprocess import SIZE_PX
from sbtk_train.models.student import Student

_STAGE = "card"
_VERSIONS_OF = (
    *(name for name in DISTRIBUTIONS if name != "tensorrt"),
    "triton",
    "onnx",
    "onnxscript",
    "cuda-bindings",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
)
# Fields of `nvidia-smi --query-gpu`; unsupported ones are "[N/A]".
_SMI = (
    "name",
    "driver_version",
    "memory.total",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.memory",
    "persistence_mode",
    "ecc.mode.current",
)
_SMI_UNDER_LOAD = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "pstate")
_PEAKS = ("fp32", "tf32", "fp16", "bf16", "int8")


def run(task: Task, report: Report) -> None:
    """Report the card, its measured peaks and the network's multiply-accumulates."""
    card = Finding(_STAGE, "card")
    if task.device == "cuda" and not torch.cuda.is_available():
        report(card.failed("torch finds no working CUDA device on this machine"))
        return
    points = [Finding(_STAGE, "peak", name) for name in _PEAKS]
    copies = [Finding(_STAGE, "copy", name) for name in ("on the device", "from pinned memory")]
    for point in (card, Finding(_STAGE, "network"), *points, *copies):
        report(point)
    attempt(report, card, lambda: _card(task.device))
    attempt(report, Finding(_STAGE, "network"), lambda: _network(task))
    for point in points:
        attempt(report, point, lambda name=point.source: _peak(name, task))  # type: ignore[misc]
    for point in copies:
        attempt(report, point, lambda name=point.source: _copy(name, task))  # type: ignore[misc]


def set_tf32(is_on: bool) -> None:
    """Allow or forbid TF32 in FP32 products and convolutions."""
    name = "tf32" if is_on else "ieee"
    torch.backends.cuda.matmul.fp32_precision = name
    torch.backends.cudnn.conv.fp32_precision = name  # type: ignore[attr-defined]
    # Keep the older `cudnn.allow_tf32` consistent.
    torch.backends.cudnn.rnn.fp32_precision = name  # type: ignore[attr-defined]


def macs_per_image(student: Student, size_px: int) -> int:
    """Return the multiply-accumulates of one embedding, in convolutions and Linears."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        student.embed(torch.zeros(1, 3, size_px, size_px))
    return int(counter.get_total_flops()) // 2


def _card(device: str) -> dict[str, Any]:
    software = {
        "python": platform.python_version(),
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "versions": installed_versions(_VERSIONS_OF),
    }
    if device == "cpu":
        return {"name": "no GPU (dry run on the CPU)", **software}
    properties = torch.cuda.get_device_properties(0)
    uuid = f"GPU-{properties.uuid}"
    card = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_cache_bytes": properties.L2_cache_size,
        "driver": _driver(),
        "nvidia_smi": _smi(_SMI, uuid),
        "nvidia_smi_idle": _smi(_SMI_UNDER_LOAD, uuid),
    }
    # Queue about a second of products, and query nvidia-smi while they run.
    product = _product("fp16", 8192, device)
    for _ in range(max(5, min(800, round(1e3 / time_run(product, device, 1, DRY)["p50_ms"])))):
        product()
    card["nvidia_smi_under_fp16_products"] = _smi(_SMI_UNDER_LOAD, uuid)
    torch.cuda.synchronize()
    return card | software


def _smi(fields: tuple[str, ...], uuid: str) -> dict[str, str]:
    """Return nvidia-smi's fields of the card, or under `error` the reason of failure."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    complaint = ""
    # In a container, the driver may not know the card under CUDA's name.
    for which in (uuid, "0"):
        try:
            done = subprocess.run(
                [*query, "-i", which], capture_output=True, text=True, check=False, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired) as problem:
            return {"error": str(problem)}
        if done.returncode == 0 and done.stdout.strip():
            values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
            return dict(zip(fields, values, strict=False))
        complaint = (done.stdout + done.stderr).strip()[:300]
    return {"error": complaint}


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except OSError:
        return ""


def _network(task: Task) -> dict[str, Any]:
    student = make_random_student(task)
    parameters = sum(p.numel() for name, p in student.named_parameters() if _is_run(name))
    return {
        "backbone": "a short resnet18" if task.is_dry_run else "resnet50-v1",
        "size_px": SIZE_PX,
        "macs_per_image": macs_per_image(student, SIZE_PX),
        "parameters": parameters,
    }


def _is_run(parameter: str) -> bool:
    return parameter.startswith(("trunk.", "embedding."))


def _peak(name: str, task: Task) -> dict[str, float]:
    """Return the speed of a large matrix product of random numbers in a number format."""
    side = 256 if task.is_dry_run else 8192
    product = _product(name, side, task.device)
    set_tf32(name == "tf32")
    try:
        times = time_run(product, task.device, 1, _effort(task))
    finally:
        set_tf32(False)
    return {"tflop_per_s": 2 * side**3 / times["p50_ms"] / 1e9, "side": side, **times}


def _product(name: str, side: int, device: str) -> Callable[[], Tensor]:
    if name == "int8":
        left, right = (
            torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
            for _ in range(2)
        )
        # Tensor cores need the right operand by columns.
        return lambda: torch._int_mm(left, right.t())
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name, torch.float32)
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(first)
    return lambda: torch.mm(first, second, out=result)


def _copy(name: str, task: Task) -> dict[str, float]:
    """Return the rate of a large copy; on the device, bytes read and bytes written count."""
    size = 1 << (20 if task.is_dry_run else 30)
    target = torch.empty(size, dtype=torch.uint8, device=task.device)
    if name == "on the device":
        source, moved = torch.ones_like(target), 2 * size
    else:
        is_pinned = task.device == "cuda"
        source, moved = torch.ones(size, dtype=torch.uint8, pin_memory=is_pinned), size
    times = time_run(lambda: target.copy_(source, non_blocking=True), task.device, 1, _effort(task))
    return {"gbyte_per_s": moved / times["p50_ms"] / 1e6, "size_bytes": size, **times}


def _effort(task: Task) -> TimingConfig:
    return DRY if task.is_dry_run else TimingConfig(warm_s=0.3, measured_s=0.8)
