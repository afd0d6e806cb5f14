"""A small convnet that starts out knowing what an image patch looks like.

The family is that of the CIFAR-10 speed records (tysam-code/hlb-CIFAR10, then KellerJordan/cifar10-airbench and
arXiv:2404.00498): a frozen whitening layer, three groups of two convolutions, identity-like initialisation, no scale in
BatchNorm, and a linear head on the globally pooled features.

Shapes: N images, C channels, H rows, W columns, O output channels, K classes.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar_kernels import bn_gelu, conv_blocked, patches_gelu
from fastcifar_kernels.conv_blocked import blocks_run
from fastcifar_kernels.layout import BLOCK_CHANNELS, GROUP

WHITEN_PX = 2  # side of a whitened patch
STRONGEST = 4  # patches by variance, that are mixed
PAIRS = (0, 1), (2, 3), (0, 2), (1, 3)  # of those, weakest first
HEAD_CLASSES = 10  # that the head's initial size and its learning rate were found for


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm with a learned bias but no scale, and statistics that forget quickly: a run is a few hundred steps."""

    def __init__(self, channels: int, fused_gelu: bool = False):
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False
        self.fused_gelu = fused_gelu

    def gelu(self, x_RC: Tensor) -> Tensor:
        """gelu(self(x)) where channels are the last axis."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        how = {"training": self.training, "momentum": self.momentum, "eps": self.eps}
        return bn_gelu(x_RC, self.bias, self.running_mean, self.running_var, **how)

    def gelu_of_map(self, x_NCHW: Tensor) -> Tensor:
        """gelu(self(x)) of a channels-last map, with the kernel on a GPU if that is asked for."""
        if self.takes_kernel(x_NCHW):
            return self.gelu(x_NCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.gelu(self(x_NCHW))

    def takes_kernel(self, x_NCHW: Tensor) -> bool:
        return self.fused_gelu and x_NCHW.is_cuda


class Conv(nn.Conv2d):
    """3x3 convolution whose first filters pass their input through unchanged."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            nn.init.dirac_(self.weight[: self.in_channels])


class Group(nn.Module):
    """Two convolutions at one resolution, the first one followed by the pooling that leads there.

    With `depth` 3, a third one, around whose and the second one's the output of the first is added.
    """

    def __init__(self, channels_in: int, channels_out: int, depth: int = 2, fused_gelu: bool = False):
        super().__init__()
        self.conv1 = Conv(channels_in, channels_out)
        self.norm1 = BatchNorm(channels_out, fused_gelu)
        self.conv2 = Conv(channels_out, channels_out)
        self.norm2 = BatchNorm(channels_out, fused_gelu)
        self.deep = depth > 2
        if self.deep:
            self.conv3 = Conv(channels_out, channels_out)
            self.norm3 = BatchNorm(channels_out, fused_gelu)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = F.max_pool2d(self.conv1(x_NCHW), 2)
        x_NCHW = self.norm1.gelu_of_map(x_NCHW)
        y_NCHW = self.norm2.gelu_of_map(self.conv2(x_NCHW))
        return x_NCHW + self.norm3.gelu_of_map(self.conv3(y_NCHW)) if self.deep else y_NCHW

    def forward_blocked(self, x_GHWMC: Tensor) -> Tensor:
        """The same of blocked images, which may have more channels than the filters: those are left out."""
        spare = x_GHWMC.size(4) - self.conv1.in_channels
        w_OCHW = F.pad(self.conv1.weight, (0, 0, 0, 0, 0, spare))
        x_GHWMC = self.norm1.gelu(conv_blocked(x_GHWMC, w_OCHW, pool=True))
        y_GHWMC = self.norm2.gelu(conv_blocked(x_GHWMC, self.conv2.weight))
        return x_GHWMC + self.norm3.gelu(conv_blocked(y_GHWMC, self.conv3.weight)) if self.deep else y_GHWMC


class SpeedNet(nn.Module):
    """Normalised images [N, 3, H, W], H = W >= 18, to logits [N, K]."""

    def __init__(
        self,
        classes: int,
        widths: tuple[int, int, int] = (64, 256, 256),
        depth: int = 2,
        own_kernels: bool = True,
        fused_gelu: bool = False,
        mixtures: bool = True,
    ):
        super().__init__()
        # Every principal patch and its negative, and sums and differences of pairs of the strongest.
        whitened = 2 * 3 * WHITEN_PX**2 + 2 * len(PAIRS) * mixtures
        self.whiten = nn.Conv2d(3, whitened, WHITEN_PX)
        self.whiten.weight.requires_grad = False
        self.mixtures = mixtures
        self.groups = nn.Sequential(
            *[Group(i, o, depth, fused_gelu) for i, o in zip((whitened, *widths), widths, strict=False)]
        )
        self.may_block = own_kernels and all(width % BLOCK_CHANNELS == 0 for width in widths)
        self.head = nn.Linear(widths[-1], classes, bias=False)
        # Ten times as many classes: of each a tenth of the images, so the head is to learn ten times as fast, which is
        # what the square root does, once to the logits and once to their gradient (LOG.md, 2026-11-30).
        self.logit_scale = (classes / HEAD_CLASSES) ** 0.5 / widths[-1]
        with torch.no_grad():
            self.head.weight /= self.head.weight.std()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        # At the end the largest response anywhere, so one set of weights serves every image size.
        if self.blocks_pay(x_NCHW):
            assert self.whiten.bias is not None
            x_GHWMC = patches_gelu(x_NCHW, self.whiten.weight, self.whiten.bias)
            for group in cast(Iterable[Group], self.groups):
                x_GHWMC = group.forward_blocked(x_GHWMC)
            x_NC = x_GHWMC.amax(dim=(1, 2)).flatten(0, 1)[: len(x_NCHW)]
        else:
            x_NC = self.groups(F.gelu(self.whiten(x_NCHW))).amax(dim=(2, 3))
        return self.head(x_NC) * self.logit_scale

    def blocks_pay(self, x_NCHW: Tensor) -> bool:
        """Whether these images go through the operators for blocked ones, on 2 cores twice as fast as torch's (LOG.md).

        Not images or whitening filters that get a gradient. GELU is a polynomial there, in float32 off by up to
        1.4e-5 of its argument, its slope by 4.8e-4 (`fastcifar_kernels.bn_gelu`).
        """
        # What fills the last group up is no image: BatchNorm must not see it.
        whole = len(x_NCHW) % GROUP == 0 or not self.training
        frozen = not (x_NCHW.requires_grad or self.whiten.weight.requires_grad) or not torch.is_grad_enabled()
        return self.may_block and whole and frozen and blocks_run(x_NCHW)

    @torch.no_grad()
    def fit_whitening(self, x_NCHW: Tensor, eps: float) -> None:
        """Set the first layer to the principal patches of these images, each scaled to unit variance, and mixtures."""
        patches_ND = F.unfold(x_NCHW.float(), WHITEN_PX).transpose(1, 2).reshape(-1, self.whiten.weight[0].numel())
        covariance_DD = patches_ND.T @ patches_ND / len(patches_ND)
        variances_D, directions_DD = torch.linalg.eigh(covariance_DD)
        filters = (directions_DD / (variances_D + eps).sqrt()).T.reshape(-1, 3, WHITEN_PX, WHITEN_PX)
        strongest = filters[-STRONGEST:]
        mixed = [(strongest[i] + sign * strongest[j]) / 2**0.5 for i, j in PAIRS for sign in (1, -1)]
        self.whiten.weight.copy_(torch.cat([filters, -filters, *([torch.stack(mixed)] if self.mixtures else [])]))
