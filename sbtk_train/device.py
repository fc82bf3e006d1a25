"""Where training runs and in which number format."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from sbtk_runtime.errors import BadConfig


@dataclass(frozen=True)
class Compute:
    """A device and the format of autocast: `fp32` (no autocast), `bf16` or `fp16`."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the autocast context of this device."""
        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    @property
    def needs_loss_scaling(self) -> bool:
        """Says whether gradients may underflow and the loss has to be scaled."""
        return self.precision == "fp16"


def choose_compute(device: str, precision: str) -> Compute:
    """Returns the device and precision that were asked for, or the best that `auto` finds.

    Raises:
        BadConfig: the device is not there, or fp16 on a CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as problem:
        raise BadConfig(f"unknown device {device!r}", "cpu, cuda or cuda:1") from problem
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BadConfig(
            f"--device {device}, and torch finds no working CUDA device",
            "an NVIDIA GPU with its driver",
            "--device cpu",
        )
    if precision == "auto":
        precision = "bf16" if _has_fast_bf16(place) else "fp32"
    if precision == "fp16" and place.type == "cpu":
        raise BadConfig("--precision fp16 on a CPU", "fp32 or bf16")
    return Compute(place, precision)


def default_workers() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # Without these instructions bf16 on a CPU is several times slower than float32.
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
