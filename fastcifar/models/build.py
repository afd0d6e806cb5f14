"""From a recipe to its model."""

from dataclasses import asdict

import torch
from torch import nn

from fastcifar.models.cnn import build_cnn
from fastcifar.models.dynamicnet import build_dynamicnet
from fastcifar.models.ensemble import Ensemble
from fastcifar.models.mlp import build_mlp
from fastcifar.models.resnet import build_resnet34
from fastcifar.models.speednet import SpeedNet
from fastcifar.settings import CnnModel, DynamicModel, MlpModel, Model, Recipe, ResNet34Model, SpeedNetModel


def build_model(recipe: Recipe, classes: int, seed: int) -> nn.Module:
    """The recipe's model, or its ensemble of them, with fresh weights, channels-last, on the CPU."""
    torch.manual_seed(seed)
    members = [build_member(recipe.model, classes) for _ in range(recipe.members)]
    model = Ensemble(members) if len(members) > 1 else members[0]
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_member(model: Model, classes: int) -> nn.Module:
    match model:
        case MlpModel():
            return build_mlp(classes, **asdict(model))
        case CnnModel():
            return build_cnn(classes, **asdict(model))
        case DynamicModel():
            return build_dynamicnet(classes, **asdict(model))
        case ResNet34Model():
            return build_resnet34(classes, model.weights)
        case SpeedNetModel():
            how = {name: getattr(model, name) for name in ("widths", "depth", "own_kernels", "fused_gelu", "mixtures")}
            return SpeedNet(classes, **how)
