"""The networks of the reports: their sizes, and that they compile in one piece."""

import shutil
from itertools import pairwise

import pytest
import torch

from fastcifar.models.build import build_model
from fastcifar.models.dynamicnet import ChannelMean
from fastcifar.recipes import NAMED

# Written down by layer: weights + biases, and for each BatchNorm a scale and a shift.
PARAMETERS = {
    "mlp": 3072 * 512 + 2 * 512 + 512 * 10 + 10,
    "cnn2": 9 * (3 * 64 + 64 * 128) + 2 * (64 + 128) + 8 * 8 * 128 * 10 + 10,
    "cnn4": 9 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256) + 2 * (32 + 64 + 128 + 256) + 2 * 2 * 256 * 10 + 10,
    "simplecnn": 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256)
    + 4 * (64 + 128 + 256)
    + (4096 * 512 + 512)
    + (512 * 100 + 100),
    "resnet34": 21_284_672 + 512 * 100 + 100,  # torchvision's, without its head of 1000
}


def dynamic_block(channels_in: int, channels_out: int, experts: int = 4) -> int:
    """Filters, coefficients, and the shortcut with its BatchNorm where the width changes."""
    shortcut = 0 if channels_in == channels_out else channels_in * channels_out + 2 * channels_out
    return 9 * channels_in * channels_out * experts + channels_in * experts + experts + shortcut


WIDTHS = 3, *[64] * 3, *[128] * 3, *[256] * 3, *[512] * 2
PARAMETERS["dynamic11"] = sum(dynamic_block(i, o) + 2 * o for i, o in pairwise(WIDTHS)) + 512 * 10 + 10
WIDTHS = 3, 64, 128, 256, 512
PARAMETERS["dynamic4"] = (
    sum(dynamic_block(i, o) + 2 * 4 * o for i, o in pairwise(WIDTHS))
    + (512 * 256 + 2 * 256)
    + (256 * 128 + 2 * 128)
    + (128 * 10 + 10)
)


def model_of(name: str) -> torch.nn.Module:
    named = NAMED[name]
    return build_model(named.recipe, 100 if named.dataset == "cifar100" else 10, seed=0)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    assert sum(weight.numel() for weight in model_of(name).parameters()) == PARAMETERS[name]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", PARAMETERS)
def test_compiles_in_one_piece(name):
    model = model_of(name).eval()
    x_NCHW = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    logits_NK = model(x_NCHW)
    assert logits_NK.shape == (4, 100 if NAMED[name].dataset == "cifar100" else 10)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x_NCHW), logits_NK, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in PARAMETERS])
def test_the_fast_way_trains_the_architecture_of_the_report(name):
    named = NAMED[name]
    assert named.reported is not None
    assert type(named.recipe.optim) is type(named.reported.optim)
    shapes = [
        [weight.shape for weight in build_model(recipe, 10, seed=0).parameters()]
        for recipe in (named.recipe, named.reported)
    ]
    assert shapes[0] == shapes[1]


def test_the_gradient_of_the_mean_of_channels_is_channels_last():
    x_NCHW = torch.randn(4, 8, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_() * 1
    mean_NC = ChannelMean()(x_NCHW)
    torch.testing.assert_close(mean_NC, x_NCHW.mean((2, 3)))
    (grad_NCHW,) = torch.autograd.grad(mean_NC.square().sum(), x_NCHW)
    assert grad_NCHW.is_contiguous(memory_format=torch.channels_last)


def test_without_batchnorm_layers_have_biases():
    from dataclasses import replace

    recipe = NAMED["mlp"].recipe
    model = build_model(replace(recipe, model=replace(recipe.model, batchnorm=False)), 10, seed=0)
    assert [tuple(weight.shape) for weight in model.parameters()] == [(512, 3072), (512,), (10, 512), (10,)]
