"""Distributed training of one student, started by torchrun.

Each process takes a shard of every batch. Outputs are gathered with their gradients, so every
process computes the loss of the whole batch, and gradients are summed over the processes. The
student equals that of a single process, up to rounding. Rank 0 reads data, validates and writes
files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import Function, once_differentiable
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from sbtk_runtime.errors import BadConfig, SbtkError
from sbtk_train.batches.sampler import Batch, BatchShard
from sbtk_train.models.student import Student

#: Rank 0 may check a large data set or validate for a long time while the others wait.
_TIMEOUT = timedelta(days=7)
_REPORTED = "reported"

T = TypeVar("T")


class OtherProcessFailed(SbtkError):
    """Another process of the run failed, so this one cannot continue."""


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run, and the rank of this one; a single process by default.

    All processes must call the collective methods (`broadcast_object`, `rank_zero_first`,
    `all_reduce_any`, `barrier`, `wrap_model`, `all_gather`), in the same order.

    Attributes:
        rank: this process, from 0.
        world_size: number of processes.
        local_rank: this process among those on its machine, from 0.
        local_world_size: number of processes on this machine.
        store: the processes' key-value store; `None` for a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store: Store | None = None

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process reads, decides and writes for all."""
        return self.rank == 0

    def device(self, requested: str) -> str:
        """Return the device of this process for the requested one: each process has its own GPU.

        Raises:
            BadConfig: one GPU is named for several processes, or there are too few GPUs.
        """
        is_gpu = requested.startswith(("auto", "cuda")) and torch.cuda.is_available()
        if self.world_size == 1 or not is_gpu:
            return requested
        if requested not in ("auto", "cuda"):
            raise BadConfig(
                f"--device {requested} for {self.world_size} processes", "--device cuda"
            )
        gpus = torch.cuda.device_count()
        if self.local_world_size > gpus:
            raise BadConfig(
                f"{self.local_world_size} processes and {gpus} GPUs",
                "a GPU for each process",
                f"torchrun --nproc-per-node {gpus}, or --device cpu",
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def broadcast_object(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 only and return its result in all processes.

        Raises:
            OtherProcessFailed: on the other ranks, if `make` raised on rank 0.
        """
        if self.world_size == 1:
            return make()
        payload: list[tuple[T] | None] = [None]
        try:
            if self.is_rank_zero:
                payload[0] = (make(),)
        finally:
            distributed.broadcast_object_list(payload, src=0, device=torch.device("cpu"))
        if payload[0] is None:
            raise OtherProcessFailed("rank 0 of this run failed")
        return payload[0][0]

    def rank_zero_first(self, make: Callable[[], T]) -> T:
        """Return `make()`, called on rank 0 first, so that the others find what it cached.

        Raises:
            OtherProcessFailed: on the other ranks, if `make` raised on rank 0.
        """
        if self.world_size == 1:
            return make()
        made: list[T] = []
        self.broadcast_object(lambda: made.append(make()))
        return made[0] if self.is_rank_zero else make()

    def all_reduce_any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is true in any process."""
        if self.world_size == 1:
            return flags
        numbers = torch.tensor(flags, dtype=torch.int32)
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
        return tuple(bool(number) for number in numbers)

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        self.all_reduce_any(False)

    def shard(self, batch: Batch) -> BatchShard:
        """Return this process's shard of a batch."""
        return BatchShard(batch, self.rank, self.world_size)

    def wrap_model(self, student: Student) -> nn.Module:
        """Return the module to call in training, which sums the gradients over the processes.

        The student itself is unchanged; validate and save the student.
        """
        if self.world_size == 1:
            return student
        # Static, since a head without a loss has no gradient in any step.
        return DistributedDataParallel(student, broadcast_buffers=False, static_graph=True)

    def all_gather(self, rows: Sequence[Tensor], shard: BatchShard, views: int) -> list[Tensor]:
        """Gather the rows of all processes, in the order of the whole batch, with gradients.

        Args:
            rows: `(V * (s + p), D) float32` tensors of this process's images.
            shard: this process's images.
            views: V, the number of views of each image.

        Returns:
            `(V * (S + P), D) float32` for each tensor.
        """
        if self.world_size == 1:
            return list(rows)
        return list(_AllGatherRows.apply(shard, views, *rows))  # type: ignore[no-untyped-call]

    def claim_report(self) -> bool:
        """Return whether this process is the first to report why the run ends."""
        if self.store is None:
            return True
        try:
            return int(self.store.add(_REPORTED, 1)) == 1
        except RuntimeError:
            return False  # the process with the store has ended, and reported

    def has_report(self) -> bool:
        """Return whether any process has reported why the run ends."""
        return self.store is not None and bool(self.store.check([_REPORTED]))


#: Training in a single process.
SINGLE_PROCESS = DistributedContext()


@contextlib.contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """Join the processes that torchrun started; without torchrun, yield `SINGLE_PROCESS`.

    The process in which an error occurred first raises it. The others end with a silent
    `SystemExit`, so that only one message is printed.

    Raises:
        BadConfig: the processes cannot connect.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield SINGLE_PROCESS
        return
    context = _context_from_environment()
    try:
        yield context
    except BaseException as problem:
        if isinstance(problem, OtherProcessFailed) or not context.claim_report():
            raise SystemExit(1) from None
        if _is_lost_connection(problem):
            raise OtherProcessFailed(
                "another process of this run ended without a message",
                f"all {context.world_size} processes to finish",
                "if the system killed it, it ran out of memory; sbtk train --resume RUN",
            ) from problem
        raise
    distributed.destroy_process_group()


class _AllGatherRows(Function):
    """Gathers the rows of all processes, in one communication for all tensors.

    Every process computes the same loss, so the gradient of its own rows is available in its own
    backward pass, without communication.
    """

    @staticmethod
    def forward(ctx: Any, shard: BatchShard, views: int, *parts: Tensor) -> tuple[Tensor, ...]:
        # A head without a loss must get no gradient, as in a single process.
        ctx.set_materialize_grads(False)
        own = torch.cat(parts, dim=1)
        ctx.rows, ctx.size = shard.rows(views).to(own.device), shard.size
        filled = own.new_zeros(shard.max_rows(views), own.shape[1])
        filled[: len(own)] = own
        gathered = [torch.empty_like(filled) for _ in range(shard.size)]
        distributed.all_gather(gathered, filled)
        joint = torch.cat(gathered)[shard.gather_order(views).to(own.device)]
        columns = torch.split(joint, [part.shape[1] for part in parts], dim=1)
        return tuple(part.contiguous() for part in columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        # DistributedDataParallel averages the gradients, but they must be summed.
        own = (None if grad is None else grad[ctx.rows] * ctx.size for grad in grad_outputs)
        return None, None, *own


def _context_from_environment() -> DistributedContext:
    try:
        store, rank, world_size = next(iter(rendezvous("env://")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(
            backend,
            store=PrefixStore("sbtk", store),
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, ValueError) as problem:
        raise BadConfig(
            f"the {os.environ['WORLD_SIZE']} processes of this run cannot connect: "
            f"{str(problem).splitlines()[0]}",
            "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them",
            "torchrun --nproc-per-node N -m sbtk_cli train DATA",
        ) from problem
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return DistributedContext(rank, world_size, local_rank, local_world_size, store)


def _is_lost_connection(problem: BaseException) -> bool:
    if isinstance(problem, distributed.DistError):
        return True
    return isinstance(problem, RuntimeError) and "gloo" in str(problem)


_OVER = (0, 2, 3)


def synchronise_batch_norms(network: nn.Module, device: torch.device) -> None:
    """Replace the batch norms in `network` by synchronised ones with the same parameters and names.

    Args:
        network: its children are replaced; it must not be a batch norm itself.
        device: where it will run; torch's own synchronised batch norm needs a GPU.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            network.add_module(name, SyncBatchNorm.of(child))
        else:
            synchronise_batch_norms(child, device)


class SyncBatchNorm(nn.BatchNorm2d):
    """A batch norm that uses, in training, the mean and variance over all processes.

    All processes must run it at once, each with its own images, or with none. Each gets the
    gradient of the weights for its own images; the sum is that of the whole batch.
    """

    @classmethod
    def of(cls, plain: nn.BatchNorm2d) -> SyncBatchNorm:
        """Return a norm that shares the parameters and buffers of `plain`."""
        norm = cls(plain.num_features, plain.eps, plain.momentum)
        norm.weight, norm.bias = plain.weight, plain.bias
        norm.running_mean, norm.running_var = plain.running_mean, plain.running_var
        norm.num_batches_tracked = plain.num_batches_tracked
        return norm.train(plain.training)

    def forward(self, values: Tensor) -> Tensor:
        """Return `(N, C, H, W)` normalised values for `(N, C, H, W)`; N may be 0 in training."""
        if not self.training:
            return super().forward(values)
        results = _JointNorm.apply(values, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        result, mean, variance, count = results
        self._track(mean, variance * count / (count - 1))
        assert isinstance(result, Tensor)
        return result

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        """Update the running statistics by a batch's."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        weight = 1 / int(self.num_batches_tracked) if momentum is None else momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(unbiased, weight)


class _JointNorm(Function):
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, with the moments of all processes."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _joint_moments(values)
        ctx.save_for_backward(values, weight, mean, torch.rsqrt(variance + eps), count)
        ctx.mark_non_differentiable(mean, variance, count)
        result = functional.batch_norm(values, mean, variance, weight, bias, eps=eps)
        return result, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, *_: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        values, weight, mean, scale, count = ctx.saved_tensors
        grad = grad_output.float()
        normal = (values.float() - _channels(mean)) * _channels(scale)
        grad_bias = grad.sum(_OVER)
        grad_weight = (grad * normal).sum(_OVER)
        joint = torch.stack([grad_bias, grad_weight])
        distributed.all_reduce(joint)
        joint = joint / count
        inner = grad - _channels(joint[0]) - normal * _channels(joint[1])
        grad_values = inner * _channels(weight * scale)
        return grad_values.to(values.dtype), grad_weight, grad_bias, None


def _joint_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean `(C,)`, biased variance `(C,)` and number of values per channel."""
    channels = values.shape[1]
    own = torch.zeros(2 * channels + 1, dtype=torch.float64, device=values.device)
    if values.numel():
        variance, mean = torch.var_mean(values.float(), _OVER, correction=0)
        own[:channels], own[channels:-1] = mean, variance
        own[-1] = values.numel() // channels
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, own)
    gathered = torch.stack(parts)
    means, variances, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
    count = counts.sum()
    joint_mean = (counts * means).sum(0) / count
    # Moments about the joint mean, since a difference of two sums of squares would cancel.
    joint_variance = (counts * (variances + (means - joint_mean).square())).sum(0) / count
    return joint_mean.float(), joint_variance.float(), count.float()


def _channels(numbers: Tensor) -> Tensor:
    return numbers.view(1, -1, 1, 1)
