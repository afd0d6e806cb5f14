"""What follows a convolution in a plain convnet, as one layer.

Shapes: N images, C channels, H rows, W columns.
"""

from torch import Tensor, nn

from fastcifar.models.global_norm import GlobalBatchNorm
from fastcifar_kernels import bn_relu_pool


class AfterConv(nn.Module):
    """BatchNorm, leaky ReLU, dropout and 2x2 max pooling, in one pass on a CPU (`bn_relu_pool`): [N, C, H, W] to same.

    Half of a step of the four-layer network was these, each in a pass of its own (LOG.md, 2026-11-21).

    Args:
        batchnorm: normalise first.
        slope: what negative values are multiplied with; 0 is a plain ReLU.
        dropout: share of the values set to 0 while training.
        pool: take the largest of every 2 x 2 pixels: [N, C, H // 2, W // 2].
    """

    def __init__(self, channels: int, *, batchnorm: bool = True, slope: float = 0.0, dropout: float = 0.0, pool=False):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if batchnorm else None
        self.how = {"slope": slope, "dropout": dropout, "pool": pool}

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.norm is None:
            return bn_relu_pool(x_NCHW, **self.how, training=self.training)
        norm = self.norm
        if isinstance(norm, GlobalBatchNorm):
            return bn_relu_pool(norm(x_NCHW), **self.how, training=self.training)
        affine = norm.weight, norm.bias, norm.running_mean, norm.running_var
        momentum = norm.momentum or 0.0
        return bn_relu_pool(x_NCHW, *affine, **self.how, training=self.training, momentum=momentum, eps=norm.eps)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.how.items())
