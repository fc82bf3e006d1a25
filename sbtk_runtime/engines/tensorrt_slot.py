"""The buffers and events of a batch on its way through a GPU, and the times between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sbtk_runtime.engines.cuda_device import checked
from sbtk_runtime.engines.device_buffers import DeviceResources, PinnedArray
from sbtk_runtime.preprocess import SIZE_PX

PICTURE_BYTES = SIZE_PX * SIZE_PX * 3
DOMAIN_BYTES = 4
_PICTURE = (SIZE_PX, SIZE_PX, 3)


@dataclass(frozen=True)
class DeviceTimes:
    """What the GPU spent on a run, by its own clock.

    Attributes:
        h2d_ms: copying pictures to the GPU.
        compute_ms: computing.
        d2h_ms: copying embeddings back.
    """

    h2d_ms: float = 0.0
    compute_ms: float = 0.0
    d2h_ms: float = 0.0

    def __add__(self, other: DeviceTimes) -> DeviceTimes:
        return DeviceTimes(
            self.h2d_ms + other.h2d_ms,
            self.compute_ms + other.compute_ms,
            self.d2h_ms + other.d2h_ms,
        )


@dataclass(frozen=True)
class Slot:
    """Buffers and events of one chunk under way.

    Attributes:
        number: from 0.
        images: `(largest, 224, 224, 3) uint8` on the host.
        domains: `(largest,) float32` on the host; `None` for a model without a domain input.
        rows: `(largest, D) float32` on the host.
        device_images: address of their place on the GPU.
        device_domains: address of their place on the GPU; 0 without them.
        device_rows: address of their place on the GPU.
        copy_begins: recorded before the pictures are copied to the GPU.
        copied: recorded after that.
        run_begins: recorded before they are computed.
        ran: recorded after that.
        done: recorded after the embeddings have been copied to the host.
    """

    number: int
    images: PinnedArray
    domains: PinnedArray | None
    rows: PinnedArray
    device_images: int
    device_domains: int
    device_rows: int
    copy_begins: Any
    copied: Any
    run_begins: Any
    ran: Any
    done: Any

    @classmethod
    def of(
        cls, resources: DeviceResources, number: int, largest: int, dim: int, *, has_domains: bool
    ) -> Slot:
        """Returns a slot with new buffers and events.

        Raises:
            OutOfDeviceMemory: there is no memory for them.
        """
        return cls(
            number,
            resources.pinned((largest, *_PICTURE), np.uint8),
            resources.pinned((largest,), np.float32) if has_domains else None,
            resources.pinned((largest, dim), np.float32),
            resources.memory(largest * PICTURE_BYTES),
            resources.memory(largest * DOMAIN_BYTES) if has_domains else 0,
            resources.memory(largest * dim * 4),
            *(resources.event() for _ in range(5)),
        )

    def times(self, cuda: Any) -> DeviceTimes:
        """Returns the times between the events, all of which must have been reached."""
        pairs = (
            (self.copy_begins, self.copied),
            (self.run_begins, self.ran),
            (self.ran, self.done),
        )
        return DeviceTimes(*(float(checked(cuda.cudaEventElapsedTime(*pair))) for pair in pairs))
