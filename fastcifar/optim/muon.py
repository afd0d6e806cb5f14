"""Muon: momentum whose update is orthogonalised, for matrices and filters.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), in the form used by
cifar10-airbench, which also keeps every filter bank at a fixed norm. torch.optim.Muon takes matrices only and does not
renormalise.

Shapes: O output channels, D = input channels x kernel height x kernel width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

# A quintic with a steep slope at zero: in few iterations every singular value lands in about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(g_OD: Tensor, steps: int) -> Tensor:
    """The nearest semi-orthogonal matrix to `g_OD`, roughly, by `steps` Newton-Schulz iterations in bfloat16.

    Returns bfloat16 [O, D]. A zero matrix stays zero.
    """
    a, b, c = QUINTIC
    x = g_OD.bfloat16()
    x = x / (x.norm() + 1e-7)  # largest singular value at most 1
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def rows_in_memory(weight: Tensor) -> tuple[int, ...]:
    """The order of dimensions in which a weight lies in memory, so that its matrix [O, D] is a view of it.

    Filters that are channels-last have their columns in another order then: that changes nothing and saves 8 % of
    Muon's time.
    """
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return (0, 2, 3, 1) if channels_last else tuple(range(weight.dim()))


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, on filters that are brought back to norm sqrt(O) before every step.

    A parameter group may say of how many `experts` each of its weights is a stack; each is treated as one of its own.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict], lr: float, momentum: float, newton_schulz_steps: int = 3
    ):
        defaults = {"lr": lr, "momentum": momentum, "newton_schulz_steps": newton_schulz_steps, "experts": 1}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                velocity = state["momentum_buffer"]
                torch.add(weight.grad, velocity, alpha=group["momentum"], out=velocity)
                g = weight.grad.add(velocity, alpha=group["momentum"])
                for own, own_g in zip(weight.chunk(group["experts"]), g.chunk(group["experts"]), strict=True):
                    order = rows_in_memory(own)
                    own_OD = own.permute(order).view(len(own), -1)
                    update_OD = orthogonalize(own_g.permute(order).flatten(1), group["newton_schulz_steps"])
                    own_OD.mul_(len(own) ** 0.5 / own.norm())
                    own_OD.add_(update_OD, alpha=-group["lr"])
