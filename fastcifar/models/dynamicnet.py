"""Convnets of dynamic convolutions: at every layer each image chooses how to mix K sets of filters.

Shapes: N images, C channels, H rows, W columns, K classes.
"""

from torch import Tensor, nn

from fastcifar.models.after_conv import AfterConv
from fastcifar.models.dynamic import DynamicConv2d, Form


class ChannelMean(nn.Module):
    """[N, C, H, W] to [N, C]: the mean of each channel, its gradient channels-last.

    That of nn.AdaptiveAvgPool2d is not: on a CPU, BatchNorm's backward pass before it then took ten times as long.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


def build_dynamicnet(
    classes: int,
    groups: tuple[tuple[int, ...], ...],
    experts: int = 4,
    norm_experts: bool = False,
    form: Form = "outputs",
    hidden: tuple[int, ...] = (),
    dropouts: tuple[float, ...] = (),
) -> nn.Sequential:
    """Normalised images [N, 3, H, W], channels-last, to logits [N, K].

    Args:
        groups: channels of the blocks, with a 2x2 max pooling between two groups.
        norm_experts: BatchNorm and ReLU on each expert's output, before they are combined and the block's input is
            added; otherwise BatchNorm and leaky ReLU after that.
        form: where the experts are combined (DynamicConv2d); with `norm_experts` only "outputs".
        hidden, dropouts: width of each linear layer before the last, with BatchNorm and ReLU, and the dropout after it.
    """
    layers: list[nn.Module] = []
    channels = 3
    for number, group in enumerate(groups, 1):
        for place, width in enumerate(group, 1):
            layers.append(DynamicConv2d(channels, width, experts, norm=norm_experts, residual=True, form=form))
            pool = place == len(group) and number < len(groups)
            if not norm_experts:
                layers.append(AfterConv(width, slope=0.01, pool=pool))
            elif pool:
                layers.append(nn.MaxPool2d(2))
            channels = width
    layers.append(ChannelMean())
    for width, dropout in zip(hidden, dropouts, strict=True):
        layers += [nn.Linear(channels, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)]
        channels = width
    model = nn.Sequential(*layers, nn.Linear(channels, classes))
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.kaiming_normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return model
