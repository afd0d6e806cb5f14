"""BatchNorm over the batches of all processes: its statistics are those of the whole batch, not of each part.

torch.nn.SyncBatchNorm does the same on GPUs only, so what it computes could not be tested beside one process on a CPU.

Shapes: N samples, C channels; R rows of channels.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastcifar.ranks import Ranks


class Sum(torch.autograd.Function):
    """Of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.add(part.clone())

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.add(grads[0].clone()), None


class GlobalBatchNorm(nn.Module):
    """Takes over weights and statistics of a BatchNorm, under the same names.

    Two sums over all processes forward, two backward: mean, then variance around it, which loses no digits.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, own: _BatchNorm, ranks: Ranks):
        super().__init__()
        self.weight, self.bias = own.weight, own.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(own, name))
        self.eps, self.momentum, self.ranks = own.eps, own.momentum or 0.0, ranks
        # torch.compile leaves it out of its graphs: what other processes do is not for it to know.
        self.sum = cast(Callable[[Tensor, Ranks], Tensor], torch.compiler.disable(Sum.apply))

    def forward(self, x_NCX: Tensor) -> Tensor:
        return self.normalise(x_NCX, channel=1)

    # As those of `models/speednet.py`.

    def gelu(self, x_RC: Tensor) -> Tensor:
        return F.gelu(self.normalise(x_RC, channel=x_RC.dim() - 1))

    def gelu_of_map(self, x_NCHW: Tensor) -> Tensor:
        return F.gelu(self(x_NCHW))

    def normalise(self, x: Tensor, channel: int) -> Tensor:
        others = [dim for dim in range(x.dim()) if dim != channel]
        shape = [x.size(channel) if dim == channel else 1 for dim in range(x.dim())]
        mean_C, variance_C = self.running_mean, self.running_var
        if self.training:
            values = self.ranks.count * x.numel() // x.size(channel)
            mean_C = self.sum(x.float().sum(others), self.ranks) / values
            variance_C = self.sum((x.float() - mean_C.view(shape)).square().sum(others), self.ranks) / values
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean_C, self.momentum)
                self.running_var.lerp_(variance_C * (values / (values - 1)), self.momentum)
        scale_C = (variance_C + self.eps).rsqrt() * (1.0 if self.weight is None else self.weight)
        out = (x.float() - mean_C.view(shape)) * scale_C.view(shape)
        return (out if self.bias is None else out + self.bias.view(shape)).to(x.dtype)


def share_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Put a GlobalBatchNorm in the place of every BatchNorm, if there are several processes."""
    if ranks.count == 1:
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, GlobalBatchNorm(child, ranks))
