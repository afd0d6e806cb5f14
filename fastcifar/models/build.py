"""From a recipe to its model."""

from dataclasses import asdict

import torch
from torch import nn

from fastcifar.models.cnn import build_cnn
from fastcifar.models.dynamicnet import build_dynamicnet
from fastcifar.models.mlp import build_mlp
from fastcifar.models.resnet import build_resnet34
from fastcifar.models.speednet import SpeedNet
from fastcifar.settings import CnnModel, DynamicModel, MlpModel, Recipe, ResNet34Model


def build_model(recipe: Recipe, classes: int, seed: int) -> nn.Module:
    """The recipe's model with fresh weights, channels-last, on the CPU."""
    torch.manual_seed(seed)
    match recipe.model:
        case MlpModel():
            model = build_mlp(classes, **asdict(recipe.model))
        case CnnModel():
            model = build_cnn(classes, **asdict(recipe.model))
        case DynamicModel():
            model = build_dynamicnet(classes, **asdict(recipe.model))
        case ResNet34Model():
            model = build_resnet34(classes, recipe.model.weights)
        case _:
            how = {name: getattr(recipe.model, name) for name in ("widths", "depth", "own_kernels", "fused_gelu")}
            model = SpeedNet(classes, **how)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
