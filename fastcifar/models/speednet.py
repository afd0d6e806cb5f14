"""A small convnet that starts out knowing what an image patch looks like.

The family is that of the CIFAR-10 speed records (tysam-code/hlb-CIFAR10, then KellerJordan/cifar10-airbench and
arXiv:2404.00498): a frozen whitening layer, three groups of two convolutions, identity-like initialisation, no scale in
BatchNorm, and a linear head on the globally pooled features.

Shapes: N images, C channels, H rows, W columns, O output channels, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WHITEN_PX = 2  # side of a whitened patch


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm with a learned bias but no scale, and statistics that forget quickly: a run is a few hundred steps."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False


class Conv(nn.Conv2d):
    """3x3 convolution whose first filters pass their input through unchanged."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            nn.init.dirac_(self.weight[: self.in_channels])


class Group(nn.Module):
    """Two convolutions at one resolution, the first one followed by the pooling that leads there."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv1 = Conv(channels_in, channels_out)
        self.norm1 = BatchNorm(channels_out)
        self.conv2 = Conv(channels_out, channels_out)
        self.norm2 = BatchNorm(channels_out)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = F.max_pool2d(self.conv1(x_NCHW), 2)
        x_NCHW = F.gelu(self.norm1(x_NCHW))
        return F.gelu(self.norm2(self.conv2(x_NCHW)))


class SpeedNet(nn.Module):
    """Normalised images [N, 3, H, W], H = W >= 18, to logits [N, K]."""

    def __init__(self, classes: int, widths: tuple[int, int, int] = (64, 256, 256)):
        super().__init__()
        whitened = 2 * 3 * WHITEN_PX**2  # every principal patch and its negative
        self.whiten = nn.Conv2d(3, whitened, WHITEN_PX)
        self.whiten.weight.requires_grad = False
        self.groups = nn.Sequential(*[Group(i, o) for i, o in zip((whitened, *widths), widths, strict=False)])
        self.head = nn.Linear(widths[-1], classes, bias=False)
        with torch.no_grad():
            self.head.weight /= self.head.weight.std()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.groups(F.gelu(self.whiten(x_NCHW)))
        # The largest response anywhere, so one set of weights serves every image size.
        x_NC = x_NCHW.amax(dim=(2, 3))
        return self.head(x_NC) / x_NC.size(1)

    @torch.no_grad()
    def fit_whitening(self, x_NCHW: Tensor, eps: float) -> None:
        """Set the first layer to the principal patches of these images, each scaled to unit variance."""
        patches_ND = F.unfold(x_NCHW.float(), WHITEN_PX).transpose(1, 2).reshape(-1, self.whiten.weight[0].numel())
        covariance_DD = patches_ND.T @ patches_ND / len(patches_ND)
        variances_D, directions_DD = torch.linalg.eigh(covariance_DD)
        filters = (directions_DD / (variances_D + eps).sqrt()).T.reshape(-1, 3, WHITEN_PX, WHITEN_PX)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))
