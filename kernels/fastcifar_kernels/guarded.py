"""Memory that shows a kernel's mistakes: filled with NaN, with a strip of NaN on either side that nobody may touch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

STRIP = 256  # elements on either side, and a multiple of every alignment that the kernels ask for

_allocate = torch.empty


class Guard:
    """Hands out guarded tensors and remembers them."""

    def __init__(self) -> None:
        self.strips: list[Tensor] = []

    def empty(self, size: tuple[int, ...], dtype: torch.dtype | None = None, device=None) -> Tensor:
        """In place of torch.empty: NaN inside and around."""
        count = math.prod(size)
        flat = _allocate((count + 2 * STRIP,), dtype=dtype, device=device).fill_(math.nan)
        self.strips += [flat[:STRIP], flat[STRIP + count :]]
        return flat[STRIP : STRIP + count].view(size)

    def copy(self, values: Tensor) -> Tensor:
        """A guarded tensor with these values and this order in memory (any gaps in it are closed)."""
        order = sorted(range(values.dim()), key=values.stride, reverse=True)
        lying = values.permute(order)
        back = [order.index(dim) for dim in range(values.dim())]
        return self.empty(tuple(lying.shape), values.dtype, values.device).copy_(lying).permute(back)

    def untouched(self) -> bool:
        """Whether every strip is still all NaN."""
        return all(bool(strip.isnan().all()) for strip in self.strips)


@contextmanager
def guarding() -> Iterator[Guard]:
    """Inside, torch.empty gives guarded memory."""
    guard = Guard()
    with mock.patch.object(torch, "empty", guard.empty):
        yield guard
