"""Random numbers for the images of a batch: the same ones, however many processes share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor


class Draws:
    """Uniform random numbers for N images.

    Where the images are a process's share of a batch, numbers are drawn for the whole batch and
    each image gets those of its place in it: it is changed as one process would change it.

    Args:
        generator: a CPU generator that all numbers come from, in the order of the calls.
        count: images in the whole batch.
        places: `(N,) int64`, where the N images stand in the batch; `None` for all of it.
    """

    def __init__(self, generator: Generator, count: int, places: Tensor | None = None) -> None:
        self._generator = generator
        self._count = count
        self._places = places

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns `(N, *shape)` numbers in [0, 1), on the CPU."""
        numbers = torch.rand(self._count, *shape, generator=self._generator, dtype=dtype)
        return numbers if self._places is None else numbers[self._places]

    def chance(self, share: float, *shape: int) -> Tensor:
        """Returns `(N, *shape) bool`, each true with the probability `share`, on the CPU."""
        return self.uniform(*shape) < share


@dataclass(frozen=True)
class BatchDraws:
    """The random numbers of a batch; both kinds of images draw from one generator.

    Attributes:
        sketches: for the batch's sketches.
        photos: for its photos.
    """

    sketches: Draws
    photos: Draws


def batch_generator(seed: int, *position: int) -> Generator:
    """Returns a generator that depends on nothing but the seed and the batch's position."""
    state = seed
    for number in position:
        state = (state * 1_000_003 + number + 1) % (1 << 62)
    return Generator().manual_seed(state)
