"""Several processes that train one model: torchrun --nproc-per-node N -m fastcifar train ...

Every batch is divided among the processes, the ranks. Gradients, BatchNorm's statistics and the loss are sums over all
of them, so N ranks train as one process does with the same batch. Whatever hangs on a clock is decided by rank 0, which
is also the only one that evaluates, writes and, errors aside, speaks.

Gradients are summed here, in one piece after the backward pass, and not by DistributedDataParallel, whose reducer waits
for every weight that learned when it was built: the whitening bias stops in the middle of a training. There is little
to hide behind the backward pass: 8 MB for `speed`.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcifar.devices import pick_device
from fastcifar.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, seen from one of them. Everything here is called by all of them, in one order."""

    rank: int = 0
    count: int = 1

    def same(self, value: T) -> T:
        """What rank 0 says."""
        if self.count == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)  # pickled, between processes of this one program
        return said[0]

    @contextmanager
    def first_here(self) -> Iterator[None]:
        """One rank of each machine goes before the others, who find on the disk what it has downloaded and written.

        A user's mistake does not keep them waiting: they go on, and meet it themselves.
        """
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if self.count > 1 and not first:
            dist.barrier()
        try:
            yield
        except UserError:
            if self.count > 1 and first:
                dist.barrier()
            raise
        if self.count > 1 and first:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether it is so at any rank."""
        if self.count == 1:
            return flag
        said: list[bool] = [False] * self.count
        dist.all_gather_object(said, flag)
        return any(said)

    def add(self, part: Tensor) -> Tensor:
        """The sum over all ranks, in place; never waits for a GPU."""
        if self.count > 1:
            dist.all_reduce(part)
        return part

    def add_gradients(self, weights: Iterable[Tensor]) -> None:
        """Every gradient becomes the sum of those of all ranks."""
        grads = [weight.grad for weight in weights if weight.grad is not None]
        if self.count == 1 or not grads:
            return
        together = self.add(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, together.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view(grad.shape))

    def take_state(self, model: nn.Module) -> None:
        """Weights and statistics become those of rank 0."""
        if self.count > 1:
            for value in model.state_dict().values():
                whole = value.contiguous()  # gloo takes nothing else, and filters are channels-last
                dist.broadcast(whole, src=0)
                value.copy_(whole)


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started, if it did: over NCCL on GPUs, over gloo on a CPU.

    Raises DeviceError: no such device, or more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    found = pick_device(device)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
