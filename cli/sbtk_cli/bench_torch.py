"""Torch beside the engines: eager and compiled contenders, and its matrix products."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from sbtk_runtime.bench.engines import Contender
from sbtk_runtime.bench.latency import Beside
from sbtk_runtime.bench.products import Product, ProductKind
from sbtk_runtime.manifest import BundleManifest


def torch_beside(
    manifest: BundleManifest, *, with_compiled: bool, said: Callable[[str], None]
) -> Beside:
    """Returns what torch can measure beside the engines of a model; nothing without torch.

    Args:
        manifest: of the model; its backbone gets random weights.
        with_compiled: measure torch compiled, too, which is channels_last as well.
        said: told what is compiled, and what is missing.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "torchvision")):
        said("torch is not installed: nothing to compare with")
        return Beside()
    return Beside(partial(_contenders, manifest, with_compiled, said), _products)


def _contenders(
    manifest: BundleManifest,
    with_compiled: bool,
    said: Callable[[str], None],
    threads: int,
    devices: Sequence[str],
) -> Iterator[Contender]:
    import torch

    from sbtk_train.students.eager import TorchSettings, compiled_run, eager_run, random_student

    student = random_student(manifest.method, manifest.backbone, manifest.dim)
    for device in devices:
        if device != "cpu" and not torch.cuda.is_available():
            said(f"torch finds no working CUDA: nothing to compare {device} with")
            continue
        where = "" if device == "cpu" else f" {device}"
        # Half precision is a GPU's, and slow on most CPUs.
        best = TorchSettings(threads, device, "fp32" if device == "cpu" else "fp16", True)
        yield Contender(
            f"torch eager{where}",
            "fp32",
            device,
            eager_run(student, TorchSettings(threads, device)),
            "eager",
        )
        yield Contender(
            f"torch eager channels_last{where}",
            best.precision,
            device,
            eager_run(student, best),
            "other",
        )
        if with_compiled:
            yield Contender(
                f"torch compiled{where}",
                best.precision,
                device,
                compiled_run(student, best, said),
                "compiled",
            )


def _products(kind: ProductKind, sizes: Sequence[int], threads: int) -> Iterator[Product]:
    from sbtk_train.students.products import product_run

    for size in sizes:
        yield Product("torch", kind, size, product_run(kind, size, threads))
