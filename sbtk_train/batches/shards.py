"""A process's shard of a batch, and its random numbers.

Process r of W takes every W-th sketch, starting at the r-th, and every W-th photo in the reverse
order of the processes, so shards differ by at most one sketch and one photo.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sbtk_train.batches.sampler import Batch


@dataclass(frozen=True)
class BatchShard:
    """A process's `s` sketches and `p` photos of a batch of `S` sketches and `P` photos.

    Attributes:
        batch: the whole batch.
        rank: the process, from 0.
        size: number of processes.
    """

    batch: Batch
    rank: int = 0
    size: int = 1

    @property
    def local(self) -> Batch:
        """The images of this process; there may be none of a kind."""
        sketches, photos = self._local_positions(self.rank)
        return Batch(self.batch.sketches[sketches.numpy()], self.batch.photos[photos.numpy()])

    def make_rngs(self, generator: Generator) -> BatchRngs:
        """Return the random number generators of this process's images."""
        counts = (len(self.batch.sketches), len(self.batch.photos))
        places = self._local_positions(self.rank)
        of_kind = (BatchRng(generator, *both) for both in zip(counts, places, strict=True))
        return BatchRngs(*of_kind)

    def rows(self, views: int = 1, rank: int | None = None) -> Tensor:
        """Return `(V * (s + p),) int64`: positions of a process's rows among all rows.

        All are the `V * (S + P)` rows of views of the batch, view after view, and sketches first
        within a view; the process's own are in the same order.

        Args:
            views: V, the number of views of each image.
            rank: the process; `None` for the shard's own.
        """
        sketches, photos = self._local_positions(self.rank if rank is None else rank)
        one_view = torch.cat([sketches, len(self.batch.sketches) + photos])
        count = len(self.batch.sketches) + len(self.batch.photos)
        return torch.cat([view * count + one_view for view in range(views)])

    def max_rows(self, views: int) -> int:
        """Return the largest number of rows of any process."""
        return max(len(self.rows(views, rank)) for rank in range(self.size))

    def gather_order(self, views: int) -> Tensor:
        """Return `(V * (S + P),) int64`: the position of each row among the gathered rows.

        These are the rows of one process after another, each padded to `max_rows`.
        """
        max_rows = self.max_rows(views)
        count = len(self.batch.sketches) + len(self.batch.photos)
        order = torch.empty(views * count, dtype=torch.int64)
        for rank in range(self.size):
            rows = self.rows(views, rank)
            order[rows] = rank * max_rows + torch.arange(len(rows))
        return order

    def _local_positions(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the positions of a process's sketches among the sketches, and of its photos."""
        return (
            torch.arange(len(self.batch.sketches))[rank :: self.size],
            torch.arange(len(self.batch.photos))[self.size - 1 - rank :: self.size],
        )


class BatchRng:
    """Random numbers for N images.

    If the images are a shard of a batch, numbers are drawn for the whole batch and each image gets
    those of its position, so augmentation does not depend on the number of processes.

    Args:
        generator: CPU generator of the numbers.
        count: number of images in the whole batch.
        places: `(N,) int64`, positions of the N images in the batch; `None` for the whole batch.
    """

    def __init__(self, generator: Generator, count: int, places: Tensor | None = None) -> None:
        self._generator = generator
        self._count = count
        self._places = places

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `(N, *shape)` uniform numbers in [0, 1), on the CPU."""
        numbers = torch.rand(self._count, *shape, generator=self._generator, dtype=dtype)
        return numbers if self._places is None else numbers[self._places]

    def bernoulli(self, share: float, *shape: int) -> Tensor:
        """Return `(N, *shape) bool`, each true with the probability `share`, on the CPU."""
        return self.uniform(*shape) < share


@dataclass(frozen=True)
class BatchRngs:
    """The random numbers of a batch; both kinds of images share a generator.

    Attributes:
        sketches: for the batch's sketches.
        photos: for its photos.
    """

    sketches: BatchRng
    photos: BatchRng


def make_generator(seed: int, *position: int) -> Generator:
    """Return a generator that is determined by the seed and the batch's position."""
    state = seed
    for number in position:
        state = (state * 1_000_003 + number + 1) % (1 << 62)
    return Generator().manual_seed(state)
