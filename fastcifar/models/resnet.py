"""torchvision's ResNet-34, made for images of 224 pixels, on images of 32.

Shapes: N images, H rows, W columns, K classes.
"""

from torch import nn

from fastcifar.data.download import import_torchvision


def build_resnet34(classes: int) -> nn.Module:
    """Normalised images [N, 3, H, W], channels-last, to logits [N, K]; weights at random."""
    import_torchvision()
    from torchvision.models import resnet34

    return resnet34(num_classes=classes)
