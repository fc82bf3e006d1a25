"""A method's part of the training loop: its batches, its views of them, and its losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sbtk_train.batches.sampler import Batch
from sbtk_train.batches.shards import BatchRngs, BatchShard
from sbtk_train.distributed import SINGLE_PROCESS, DistributedContext
from sbtk_train.models.student import StudentOutput


@dataclass(frozen=True)
class Examples:
    """The images of one step, `S` sketches and then `P` photos.

    Where several processes shard the batch, `inputs` are this one's own `s` sketches and `p`
    photos, and `all_gather` brings their outputs into the batch's order. All else is of the whole
    batch.

    Attributes:
        inputs: `(V * (s + p), ...)`, what the student was given: view after view, images or
            feature maps at the stage `begin`.
        begin: the trunk's stage that they enter; empty for images.
        labels: `(S + P,) int64`, indices of training classes.
        domains: `(S + P,) float32`, 0 for sketches and 1 for photos.
        sketches: S.
        shard: which of the images this process has.
        distributed: the processes.
    """

    inputs: Tensor
    begin: str
    labels: Tensor
    domains: Tensor
    sketches: int
    shard: BatchShard | None = None
    distributed: DistributedContext = SINGLE_PROCESS

    def first_view(self) -> Tensor:
        """Return the first view of the own images, `(s + p, ...)`."""
        return self.inputs[: len(self.own_domains())]

    def own_domains(self) -> Tensor:
        """Return `(s + p,) float32`, the domains of the own images."""
        return self.domains if self.shard is None else self.domains[self.shard.rows()]

    def all_gather(self, rows: Tensor) -> Tensor:
        """Return `(S + P, D)` rows for the `(s + p, D) float32` of one view of own images."""
        return rows if self.shard is None else self.distributed.all_gather([rows], self.shard, 1)[0]


class Objective(Protocol):
    """One method's batches, views and losses.

    Attributes:
        views: how many views of each image a step sees, 1 or more.
    """

    views: int

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch; a pure function of seed and epoch."""
        ...

    def views_of(self, sketches: Tensor, photos: Tensor, rng: BatchRngs) -> Tensor:
        """Return `(V * (S + P), 3, H, W)` normalised images, view after view, sketches first.

        Args:
            sketches: `(S, 1, H, W) uint8`, dark ink on white.
            photos: `(P, 3, H, W) uint8`.
            rng: for these sketches and photos; all chance comes from it.
        """
        ...

    def start_epoch(self) -> None:
        """Clear what is kept only within an epoch."""
        ...

    def terms(self, output: StudentOutput, examples: Examples) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, by name; their sum is minimised.

        Args:
            output: of all `V * (S + P)` inputs, in their order.
            examples: what they were made from.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs beyond the student."""
        ...

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        ...
