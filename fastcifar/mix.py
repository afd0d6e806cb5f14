"""Mixup and cutmix, which are torchvision's."""

from functools import cache

import torch
from torch import Tensor

from fastcifar.data.download import import_torchvision
from fastcifar.settings import Recipe


@cache
def mixer(name: str, alpha: float, classes: int):
    import_torchvision()
    from torchvision.transforms import v2

    return {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name](alpha=alpha, num_classes=classes)


def mix(recipe: Recipe, classes: int, x_BCHW: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
    """torchvision's mixup or cutmix of a batch: images, and the share of each class in them [B, K]."""
    x_BCHW, target_BK = mixer(recipe.mix, recipe.mix_alpha, classes)(x_BCHW, y_B)
    return x_BCHW.contiguous(memory_format=torch.channels_last), target_BK.float()
