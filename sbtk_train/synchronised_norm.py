"""Batch norm over the images of all processes, so that several train as one would.

torch's `SyncBatchNorm` does that on a GPU and nowhere else; `SynchronisedNorm` does it on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional

_OVER = (0, 2, 3)


def synchronise_norms(network: nn.Module, device: torch.device) -> None:
    """Replaces the batch norms in `network`; parameters, buffers and their names stay.

    Args:
        network: whose children are replaced; it is no batch norm itself.
        device: where it will run.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            network.add_module(name, SynchronisedNorm.of(child))
        else:
            synchronise_norms(child, device)


class SynchronisedNorm(nn.BatchNorm2d):
    """A batch norm whose mean and variance are, in training, over the images of all processes.

    All processes have to run it at once, each with its own images, or with none. The gradient of
    the weights is of the own images; the sum over the processes is that of the whole batch.
    """

    @classmethod
    def of(cls, plain: nn.BatchNorm2d) -> SynchronisedNorm:
        """Returns a norm with the very parameters and buffers of `plain`."""
        norm = cls(plain.num_features, plain.eps, plain.momentum)
        norm.weight, norm.bias = plain.weight, plain.bias
        norm.running_mean, norm.running_var = plain.running_mean, plain.running_var
        norm.num_batches_tracked = plain.num_batches_tracked
        return norm.train(plain.training)

    def forward(self, values: Tensor) -> Tensor:
        """Returns `(N, C, H, W)` normalised values for `(N, C, H, W)`; N may be 0 in training."""
        if not self.training:
            return super().forward(values)
        results = _JointNorm.apply(values, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        result, mean, variance, count = results
        self._remember(mean, variance * count / (count - 1))
        assert isinstance(result, Tensor)
        return result

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        share = 1 / int(self.num_batches_tracked) if momentum is None else momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(unbiased, share)


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
    def backward(ctx: Any, slope: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
        values, weight, mean, scale, count = ctx.saved_tensors
        rows, slope_rows = values.float(), slope.float()
        along_bias = slope_rows.sum(_OVER)
        normal = (rows - _channels(mean)) * _channels(scale)
        along_weight = (slope_rows * normal).sum(_OVER)
        joint = torch.stack([along_bias, along_weight])
        distributed.all_reduce(joint)
        joint = joint / count
        inner = slope_rows - _channels(joint[0]) - normal * _channels(joint[1])
        along_values = inner * _channels(weight * scale)
        return along_values.to(values.dtype), along_weight, along_bias, None


def _joint_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean `(C,)`, biased variance `(C,)` and the number of values that they are of."""
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
    # Moments of the parts about the joint mean: a difference of two sums of squares would cancel.
    joint_variance = (counts * (variances + (means - joint_mean).square())).sum(0) / count
    return joint_mean.float(), joint_variance.float(), count.float()


def _channels(numbers: Tensor) -> Tensor:
    return numbers.view(1, -1, 1, 1)
