"""Muon: momentum whose update is orthogonalised, for matrices and filters.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), in the form used by
cifar10-airbench, which also keeps every filter bank at a fixed norm. torch.optim.Muon takes matrices only and does not
renormalise. The iteration's products are of small matrices as in J. Zhang, N. Amsel, B. Chen, T. Dao, "Gram
Newton-Schulz" (2026).

Shapes: O output channels, D = input channels x kernel height x kernel width, S matrices of one shape.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastcifar_kernels import vectors

# A quintic with a steep slope at zero: in few iterations every singular value lands in about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)

# How many iterations go on the small matrix before the large one is multiplied. Each makes the roundings of those
# before larger: with more at once the errors of bfloat16 can grow without bound (seven steps, four first: 4e10).
FIRST_AT_ONCE, AT_ONCE = 3, 2


def orthogonalize(g_SOD: Tensor, steps: int) -> Tensor:
    """The nearest semi-orthogonal matrices to `g_SOD`, roughly, by `steps` Newton-Schulz iterations.

    Takes one matrix [O, D] or S of them. Returns bfloat16 of the same shape, or float32 from a CPU that multiplies no
    bfloat16: imitated, it took 36 times as long with AVX2. A zero matrix stays zero.
    """
    imitated = g_SOD.device.type == "cpu" and torch.bfloat16 not in vectors.LANES
    x = g_SOD.to(torch.float32 if imitated else torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # largest singular value at most 1
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    at_once = FIRST_AT_ONCE
    while steps > 0:
        x = iterate(x, min(steps, at_once))
        steps, at_once = steps - at_once, AT_ONCE
    return x.mT if tall else x


def iterate(x_SOD: Tensor, steps: int) -> Tensor:
    """`steps` Newton-Schulz iterations of matrices with O <= D, which are multiplied only twice for all of them.

    An iteration is x <- (a + b g + c g²) x with the Gram matrix g = x xᵀ. All its factors are polynomials in the first
    g, symmetric and commuting; so the factors of every iteration, and the Gram matrix after it, are got from the one
    before by products [O, O], and their product is applied to x at the end.
    """
    a, b, c = QUINTIC
    multiply = torch.addmm if x_SOD.dim() == 2 else torch.baddbmm
    gram_SOO = x_SOD @ x_SOD.mT
    q_SOO = multiply(gram_SOO, gram_SOO, gram_SOO, beta=b, alpha=c)  # an iteration's factor is a + q,
    scale, r_SOO = a, q_SOO  # that of all of them so far scale + r: so the identity is never rounded to bfloat16
    for _ in range(steps - 1):
        for _ in range(2):  # g (a + q)², as x on both of its sides has become (a + q) x
            gram_SOO = multiply(gram_SOO, q_SOO, gram_SOO, beta=a)
        q_SOO = multiply(gram_SOO, gram_SOO, gram_SOO, beta=b, alpha=c)
        r_SOO = multiply(r_SOO, q_SOO, r_SOO, beta=a).add_(q_SOO, alpha=scale)
        scale *= a
    return multiply(x_SOD, r_SOO, x_SOD, beta=scale)


def orthogonalize_all(alike: list[Tensor], steps: int) -> Iterable[Tensor]:
    """Of matrices [O, D] of one shape: on a GPU at once, on a CPU, where that takes 1.5 times as long, one by one."""
    if alike[0].device.type == "cpu":
        return (orthogonalize(g_OD, steps) for g_OD in alike)
    return orthogonalize(torch.stack(alike), steps)


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
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float | Tensor,
        momentum: float,
        newton_schulz_steps: int = 3,
    ):
        defaults = {"lr": lr, "momentum": momentum, "newton_schulz_steps": newton_schulz_steps, "experts": 1}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)  # by shape: the matrix of each expert, a view, and the way it is to go
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
                    alike[own_OD.shape].append((own_OD, own_g.permute(order).flatten(1)))
            for shape, pairs in alike.items():
                updates = orthogonalize_all([g_OD for _, g_OD in pairs], group["newton_schulz_steps"])
                for (own_OD, _), update_OD in zip(pairs, updates, strict=True):
                    own_OD.mul_(shape[0] ** 0.5 / own_OD.norm())
                    # A CUDA graph is given its learning rate as a tensor.
                    own_OD.addcmul_(update_OD, torch.as_tensor(-group["lr"], device=own_OD.device))
