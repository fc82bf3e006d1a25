"""Where a step's inputs come from: decoded images that are changed afresh, or kept feature maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from torch import Tensor

from sbtk_train.batches.draws import BatchDraws
from sbtk_train.batches.pixels import PixelStore, fits_in_memory
from sbtk_train.batches.sampler import Batch
from sbtk_train.batches.shares import Share
from sbtk_train.data import ImageSet
from sbtk_train.device import Compute
from sbtk_train.objectives.objective import Objective


class Source(Protocol):
    """Makes the student's inputs from batches of rows.

    Attributes:
        begin: the trunk's stage that the inputs enter; empty for images.
    """

    begin: str

    def load(self, batch: Batch, number: int) -> Any:
        """Returns what can be fetched ahead, in a thread of its own, for a step of the epoch."""
        ...

    def inputs(self, loaded: Any, draw: BatchDraws) -> Tensor:
        """Returns `(V * (S + P), ...)` inputs on the device, view after view, sketches first."""
        ...

    def close(self) -> None:
        """Frees what is held."""
        ...


class PixelSource:
    """Decodes images and lets the objective change them."""

    begin = ""

    def __init__(
        self,
        data: ImageSet,
        objective: Objective,
        size_px: int,
        compute: Compute,
        workers: int,
        *,
        processes: int = 1,
        variation: Sequence[int] = (),
        redrawn: float = 0.0,
    ) -> None:
        keep = fits_in_memory(data, size_px, processes)
        self._sketches = PixelStore(
            data.sketches, "sketch", size_px, workers=workers, keep=keep, redrawn=redrawn
        )
        self._variation = tuple(variation)
        self._photos = PixelStore(data.photos, "photo", size_px, workers=workers, keep=keep)
        self._objective = objective
        self._device = compute.device

    def load(self, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
        """Returns `(S, 1, H, W)` and `(P, 3, H, W) uint8` pixels."""
        sketches = self._sketches.batch(batch.sketches, (*self._variation, number))
        return sketches, self._photos.batch(batch.photos)

    def inputs(self, loaded: tuple[Tensor, Tensor], draw: BatchDraws) -> Tensor:
        """Returns the objective's views `(N, 3, h, w) float32` of the pixels."""
        sketches, photos = (pixels.to(self._device) for pixels in loaded)
        return self._objective.views_of(sketches, photos, draw)

    def close(self) -> None:
        """Ends the decoding threads."""
        self._sketches.close()
        self._photos.close()


def prefetched(
    shares: Iterator[Share], skip: int, source: Source
) -> Iterator[tuple[int, Share, Any]]:
    """Yields number, share and what the source loaded, from batch `skip` on, one batch ahead."""
    wanted = [(number, share) for number, share in enumerate(shares) if number >= skip]
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(source.load, wanted[0][1].own, wanted[0][0]) if wanted else None
        for place, (number, share) in enumerate(wanted):
            assert following is not None
            loaded = following.result()
            if place + 1 < len(wanted):
                coming, its_share = wanted[place + 1]
                following = ahead.submit(source.load, its_share.own, coming)
            yield number, share, loaded
