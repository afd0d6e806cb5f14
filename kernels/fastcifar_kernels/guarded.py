"""Memory that shows a kernel's mistakes: filled with NaN, with a strip of NaN on either side that nobody may touch."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

STRIP = 256  # elements on either side, and a multiple of every alignment that the kernels ask for
BITS = {4: (torch.int32, 0x7FC00000), 2: (torch.int16, 0x7FC0)}  # NaN in float32, bfloat16 and float16

_allocate = torch.empty


class Guard:
    """Hands out guarded tensors and remembers them. Each has a NaN of its own, so that a copied one shows too."""

    def __init__(self) -> None:
        self.strips: list[tuple[Tensor, int]] = []
        self.marks = itertools.cycle(range(1, 60))

    def empty(self, size: tuple[int, ...], dtype: torch.dtype | None = None, device=None) -> Tensor:
        """In place of torch.empty: NaN inside and around."""
        count = math.prod(size)
        flat = _allocate((count + 2 * STRIP,), dtype=dtype, device=device)
        bits, nan = BITS[flat.element_size()]
        mark = nan + next(self.marks)
        flat.view(bits).fill_(mark)
        self.strips += [(flat[:STRIP].view(bits), mark), (flat[STRIP + count :].view(bits), mark)]
        return flat[STRIP : STRIP + count].view(size)

    def copy(self, values: Tensor, gap: int = 0) -> Tensor:
        """A guarded tensor with these values in this order, with `gap` elements of NaN at the end of every axis."""
        order = sorted(range(values.dim()), key=values.stride, reverse=True)
        lying = values.permute(order)
        spacious = self.empty(tuple(size + gap for size in lying.shape), values.dtype, values.device)
        part = spacious[tuple(slice(size) for size in lying.shape)].copy_(lying)
        return part.permute([order.index(dim) for dim in range(values.dim())])

    def untouched(self) -> bool:
        """Whether every strip still is as it was."""
        return all(bool((strip == mark).all()) for strip, mark in self.strips)


@contextmanager
def guarding() -> Iterator[Guard]:
    """Inside, torch.empty gives guarded memory."""
    guard = Guard()
    with mock.patch.object(torch, "empty", guard.empty):
        yield guard
