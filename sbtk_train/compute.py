"""The device that trains, and its precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from sbtk_runtime.errors import BadConfig


@dataclass(frozen=True)
class Compute:
    """A device, and the precision of autocast: `fp32` (no autocast), `bf16` or `fp16`."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of this device."""
        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether gradients may underflow, so that the loss must be scaled."""
        return self.precision == "fp16"


def choose_compute(device: str, precision: str) -> Compute:
    """Return the requested device and precision, or the best ones for `auto`.

    Raises:
        BadConfig: the device does not exist, or fp16 on a CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as problem:
        raise BadConfig(f"unknown device {device!r}", "cpu, cuda or cuda:1") from problem
    if place.type not in ("cpu", "cuda"):
        raise BadConfig(f"--device {device}", "cpu, cuda or cuda:1")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BadConfig(
            f"--device {device}, but torch finds no working CUDA device",
            "an NVIDIA GPU with its driver",
            "--device cpu",
        )
    if precision == "auto":
        precision = "bf16" if _has_fast_bf16(place) else "fp32"
    if precision == "fp16" and place.type == "cpu":
        raise BadConfig("--precision fp16 on a CPU", "fp32 or bf16")
    return Compute(place, precision)


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # On a CPU without these instructions, bf16 is several times slower than fp32.
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
