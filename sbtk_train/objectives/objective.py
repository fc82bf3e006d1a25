"""A method's part of the training loop: batches, views and losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sbtk_train.batches.sampler import Batch, BatchRngs, BatchShard
from sbtk_train.distributed import SINGLE_PROCESS, DistributedContext
from sbtk_train.models.student import StudentOutput


@dataclass(frozen=True)
class Examples:
    """The images of one step, `S` sketches and then `P` photos.

    If several processes shard the batch, `inputs` are this process's `s` sketches and `p` photos,
    and `all_gather` returns outputs in the batch's order. The other attributes are of the whole
    batch.

    Attributes:
        inputs: `(V * (s + p), ...)`, the student's inputs, view after view: images, or feature maps
            at the stage `begin`.
        begin: the trunk's stage that takes the inputs; empty for images.
        labels: `(S + P,) int64`, indices of training classes.
        domains: `(S + P,) float32`, 0 for sketches and 1 for photos.
        sketches: S.
        shard: this process's images; `None` for all.
        distributed: the processes of the run.
    """

    inputs: Tensor
    begin: str
    labels: Tensor
    domains: Tensor
    sketches: int
    shard: BatchShard | None = None
    distributed: DistributedContext = SINGLE_PROCESS

    def first_view(self) -> Tensor:
        """Return the first view of this process's images, `(s + p, ...)`."""
        return self.inputs[: len(self.own_domains())]

    def own_domains(self) -> Tensor:
        """Return the domains of this process's images, `(s + p,) float32`."""
        return self.domains if self.shard is None else self.domains[self.shard.rows()]

    def all_gather(self, rows: Tensor) -> Tensor:
        """Return all processes' rows `(S + P, D)`, given this one's of a view, `(s + p, D)`."""
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
            rng: the random numbers of these sketches and photos.
        """
        ...

    def start_epoch(self) -> None:
        """Reset the state of an epoch."""
        ...

    def terms(self, output: StudentOutput, examples: Examples) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, by name; their sum is minimised.

        Args:
            output: the outputs of all `V * (S + P)` inputs, in their order.
            examples: the inputs, labels and domains.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs, besides the student."""
        ...

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        ...
