"""Plain convnets: blocks of 3x3 convolutions, each block halving the image, then linear layers on what is left.

Shapes: N images, C channels, H = W = 32, K classes.
"""

from torch import nn

from fastcifar.models.after_conv import AfterConv
from fastcifar.models.conv import Conv2d

IMAGE_PX = 32


def build_cnn(
    classes: int,
    blocks: tuple[tuple[int, ...], ...],
    hidden: int = 0,
    batchnorm: bool = True,
    block_dropout: float = 0.0,
    dropout: float = 0.5,
) -> nn.Sequential:
    """Normalised images [N, 3, 32, 32], channels-last, to logits [N, K].

    Args:
        blocks: for each block, the channels of its convolutions, each followed by BatchNorm and ReLU.
        hidden: width of a linear layer with ReLU before the last; 0 for none.
        block_dropout: at the end of each block, before its 2x2 max pooling.
        dropout: before the last layer.
    """
    layers: list[nn.Module] = []
    channels = 3
    for block in blocks:
        for number, width in enumerate(block, 1):
            # BatchNorm takes away whatever a bias adds.
            layers.append(Conv2d(channels, width, 3, padding=1, bias=not batchnorm))
            last = number == len(block)
            dropped = block_dropout if last else 0.0
            layers.append(AfterConv(width, batchnorm=batchnorm, dropout=dropped, pool=last))
            channels = width
    features = channels * (IMAGE_PX >> len(blocks)) ** 2
    layers.append(nn.Flatten())
    if hidden:
        layers += [nn.Linear(features, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(hidden or features, classes))
