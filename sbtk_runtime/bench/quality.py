"""What each engine and precision costs in mAP, beside the FP32 model on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sbtk_runtime.bench.map import LabelledSet, measure_map
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embed import Embedder
from sbtk_runtime.engines.engine import AUTO
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.manifest import Precision

#: The figure that is compared.
FIGURE = "mAP@all"

_REFERENCE_ENGINE = "onnxruntime"
#: What stands for the model itself: the first of these that the bundle has.
_REFERENCE_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


@dataclass(frozen=True)
class EngineKey:
    """One engine in one precision on one device."""

    engine: str
    precision: Precision
    device: str

    @property
    def name(self) -> str:
        """Engine and precision."""
        return f"{self.engine} {self.precision}"


@dataclass(frozen=True)
class Quality:
    """mAP@all of each engine and precision on the same pictures.

    Attributes:
        protocol: which classes, how many sketches and photos, and how they were ranked.
        reference: the engine and precision that differences are to; empty without any.
        figures: engine and precision to mAP@all, the reference's too.
    """

    protocol: str
    reference: str
    figures: dict[str, float]

    def difference(self, name: str) -> float | None:
        """Returns how much more mAP@all an engine has than the reference."""
        if name not in self.figures or self.reference not in self.figures:
            return None
        return self.figures[name] - self.figures[self.reference]


def measure_quality(
    bundle: Bundle,
    images: LabelledSet,
    engines: Iterable[EngineKey],
    threads: int,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Quality, list[str]]:
    """Returns the mAP of each engine, and notes on what could not be measured or compared.

    Each embeds all the pictures once. The reference is the FP32 file on a CPU, or the FP16 file
    of a bundle without; without either there are no differences.
    """
    reference, notes = _reference(bundle, threads)
    figures: dict[str, float] = {}
    protocol = ""
    for key in dict.fromkeys([*([reference] if reference else []), *engines]):
        progress(f"measuring {FIGURE} of {key.name} on {images.of}")
        try:
            with _embedder(bundle, key.engine, key.precision, key.device, threads) as embedder:
                report = measure_map(embedder, images.sketches, images.photos, of=images.of)
        # A figure less is no reason to lose those that are there.
        except SbtkError as problem:
            notes.append(f"{FIGURE} of {key.name} not measured: {problem.found}")
            continue
        figures[key.name] = report.figures[FIGURE]
        protocol = report.protocol
    return Quality(protocol, reference.name if reference else "", figures), notes


def _reference(bundle: Bundle, threads: int) -> tuple[EngineKey | None, list[str]]:
    """Returns what stands for the model itself, and a note where that is not FP32."""
    for precision in _REFERENCE_PRECISIONS:
        if precision not in bundle.precisions:
            continue
        for engine in (_REFERENCE_ENGINE, AUTO):
            try:
                with _embedder(bundle, engine, precision, "cpu", threads) as embedder:
                    found = EngineKey(embedder.engine.info.name, precision, "cpu")
            except SbtkError:
                continue
            note = f"the bundle has no fp32 file: differences of mAP are to {found.name}"
            return found, [] if precision == "fp32" else [note]
    return None, ["no differences of mAP: neither fp32 nor fp16 runs on a CPU here"]


def _embedder(
    bundle: Bundle, engine: str, precision: Precision, device: str, threads: int
) -> Embedder:
    return Embedder(bundle, engine=engine, precision=precision, threads=threads, device=device)
