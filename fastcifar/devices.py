"""From the word after --device to a torch device that is really there."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastcifar.errors import DeviceError


def pick_device(name: str) -> torch.device:
    """ "auto" is a GPU, or the CPU where there is none; a GPU that is named becomes the current one.

    Raises DeviceError for a device this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"--device: {name!r} is no device.", "--device auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device: {name} is not supported.", "--device cpu or --device cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"--device: no GPU can be used by torch {torch.__version__} here.", "fastcifar doctor")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise DeviceError(f"--device: there is no {name}, the last one is cuda:{last}.", f"--device cuda:{last}")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # a graph records what the current one is given
    return device


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device. A GPU is not waited for, as it would be if the memory were not pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: of the GPU by tensors, or of the machine by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def out_of_memory_named(batch_size: int) -> Iterator[None]:
    """Turn the many ways of running out of memory into a DeviceError that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On the CPU torch raises a plain RuntimeError, known by its text alone.
        if (
            isinstance(error, RuntimeError)
            and "can't allocate memory" not in str(error)
            and "out of memory" not in str(error)
        ):
            raise
        message = f"Out of memory with batches of {batch_size} images: {str(error).splitlines()[0]}"
        raise DeviceError(message, f"--batch_size {max(2, batch_size // 2)}") from error
