"""nn.Conv2d that takes matrix products where a CPU is faster with them.

Shapes: N images, C channels, H rows, W columns, O output channels.
"""

import torch
from torch import Tensor, nn

from fastcifar_kernels import conv_matmul

# A 3x3 convolution of up to one pixel for each so many bytes of filters, but of no more than MOST_PIXELS, is faster as
# matrix products: measured in bfloat16 with AMX (bench/records/2026-11-21-small-maps-cpu), on no other CPU.
BYTES_A_PIXEL, MOST_PIXELS = 2**16, 64


class Conv2d(nn.Conv2d):
    """[N, C, H, W] to [N, O, H', W'], channels-last; the same result either way, within rounding."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        dtype = compute_dtype(x_NCHW)
        if self.is_plain_3x3 and self.pays_as_matmul(x_NCHW, dtype):
            return conv_matmul(x_NCHW.to(dtype), self.weight)
        return super().forward(x_NCHW)

    @property
    def is_plain_3x3(self) -> bool:
        """Whether this is the one kind of convolution that there is the other way for."""
        shape = self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode, self.bias
        return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros", None)

    def pays_as_matmul(self, x_NCHW: Tensor, dtype: torch.dtype) -> bool:
        if x_NCHW.device.type != "cpu" or dtype != torch.bfloat16:
            return False
        pixels = x_NCHW.size(2) * x_NCHW.size(3)
        return pixels <= min(MOST_PIXELS, self.weight.numel() * dtype.itemsize / BYTES_A_PIXEL)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of `x` computes in: autocast's type where that is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def use_conv2d(model: nn.Module) -> None:
    """Make every nn.Conv2d inside one of these."""
    for part in model.modules():
        if type(part) is nn.Conv2d:
            part.__class__ = Conv2d
