"""A network without convolutions: it has to learn anew at every place of the image what an edge is.

Shapes: N images, H = W = 32, K classes.
"""

from torch import nn

IMAGE_PX = 32


def build_mlp(
    classes: int, hidden: tuple[int, ...] = (512,), batchnorm: bool = True, dropout: float = 0.5
) -> nn.Sequential:
    """Normalised images [N, 3, 32, 32] to logits [N, K]; after each hidden layer BatchNorm, ReLU and dropout."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = 3 * IMAGE_PX**2
    for units in hidden:
        layers.append(nn.Linear(width, units, bias=not batchnorm))
        if batchnorm:
            layers.append(nn.BatchNorm1d(units))
        layers += [nn.ReLU(), nn.Dropout(dropout)]
        width = units
    return nn.Sequential(*layers, nn.Linear(width, classes))
