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
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(weight.grad)
                g = weight.grad.add(velocity, alpha=group["momentum"])
                for own, own_g in zip(weight.chunk(group["experts"]), g.chunk(group["experts"]), strict=True):
                    update = orthogonalize(own_g.flatten(1), group["newton_schulz_steps"]).view_as(own)
                    own.mul_(len(own) ** 0.5 / own.norm())
                    own.add_(update, alpha=-group["lr"])
