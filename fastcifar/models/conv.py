"""nn.Conv2d that takes another way where a CPU is faster with it: matrix products, or blocked images.

Shapes: N images, C channels, H rows, W columns, O output channels; G groups of M images (`conv_blocked`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar_kernels import amx, conv_blocked, conv_matmul, vectors
from fastcifar_kernels.layout import BLOCK_CHANNELS, GROUP

# A 3x3 convolution of up to one pixel for each so many bytes of filters, but of no more than MOST_PIXELS, is faster as
# matrix products: measured in bfloat16 with AMX (bench/records/2026-11-21-small-maps-cpu).
BYTES_A_PIXEL, MOST_PIXELS = 2**16, 64
# Without AMX one of more than FEW_PIXELS is up to 2.5 times as fast in blocks, both copies included
# (bench/records/2026-11-22-convolutions, `bench/convolutions.py`). With AMX that is not measured.
FEW_PIXELS = 4


class Conv2d(nn.Conv2d):
    """[N, C, H, W] to [N, O, H', W'], channels-last; the same result any way, within rounding."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        dtype = compute_dtype(x_NCHW)
        if self.is_plain_3x3:
            if self.pays_in_blocks(x_NCHW, dtype):
                return conv_in_blocks(x_NCHW.to(dtype), self.weight)
            if self.pays_as_matmul(x_NCHW, dtype):
                return conv_matmul(x_NCHW.to(dtype), self.weight)
        return super().forward(x_NCHW)

    @property
    def is_plain_3x3(self) -> bool:
        """Whether this is the one kind of convolution that there are other ways for."""
        shape = self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode, self.bias
        return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros", None)

    def pays_in_blocks(self, x_NCHW: Tensor, dtype: torch.dtype) -> bool:
        whole = self.in_channels % BLOCK_CHANNELS == 0 and self.out_channels % BLOCK_CHANNELS == 0
        runs = x_NCHW.device.type == "cpu" and dtype in vectors.LANES
        with_amx = dtype == torch.bfloat16 and amx.available()
        return whole and runs and not with_amx and x_NCHW.size(2) * x_NCHW.size(3) > FEW_PIXELS

    def pays_as_matmul(self, x_NCHW: Tensor, dtype: torch.dtype) -> bool:
        if x_NCHW.device.type != "cpu" or dtype != torch.bfloat16:
            return False
        pixels = x_NCHW.size(2) * x_NCHW.size(3)
        return pixels <= min(MOST_PIXELS, self.weight.numel() * dtype.itemsize / BYTES_A_PIXEL)


def conv_in_blocks(x_NCHW: Tensor, w_OCHW: Tensor) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1 without bias: [N, O, H, W], channels-last.

    The images are copied into blocks, and the result is copied back; channels and filters are multiples of 32.
    """
    images = len(x_NCHW)
    x_NHWC = F.pad(x_NCHW.permute(0, 2, 3, 1), (0, 0, 0, 0, 0, 0, 0, -images % GROUP))
    y_GHWMO = conv_blocked(x_NHWC.unflatten(0, (-1, GROUP)).permute(0, 2, 3, 1, 4), w_OCHW)
    y_NHWO = y_GHWMO.permute(0, 3, 1, 2, 4).flatten(0, 1)[:images]
    return y_NHWO.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of `x` computes in: autocast's type where that is on, else that of `x`."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # "meta" has none
    return torch.get_autocast_dtype(kind) if on else x.dtype


def use_conv2d(model: nn.Module) -> None:
    """Make every nn.Conv2d inside one of these."""
    for part in model.modules():
        if type(part) is nn.Conv2d:
            part.__class__ = Conv2d
