"""Batches at the size that a stage of the training asks for."""

import torch
from torch.nn import functional as F


def resize(x_BCHW: torch.Tensor, image_px: int) -> torch.Tensor:
    """The images at another size, antialiased; float32 inside, which the CPU's bilinear filter needs."""
    if x_BCHW.size(3) == image_px:
        return x_BCHW
    small = F.interpolate(x_BCHW.float(), size=image_px, mode="bilinear", antialias=True)
    return small.to(x_BCHW.dtype, memory_format=torch.channels_last)
