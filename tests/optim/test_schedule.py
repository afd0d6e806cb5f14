"""Who learns how fast, when."""

import pytest
import torch

from fastcifar.models.speednet import SpeedNet
from fastcifar.optim.schedule import build_optimizers, one_cycle, set_learning_rates
from fastcifar.recipes import Optim


@pytest.mark.parametrize(
    ("progress", "warmup", "until", "expected"),
    [
        (0.0, 0.0, 1.0, 1.0),
        (0.5, 0.0, 1.0, 0.5),
        (1.0, 0.0, 1.0, 0.0),
        (0.1, 0.2, 1.0, 0.5),
        (0.2, 0.2, 1.0, 1.0),
        (0.6, 0.2, 1.0, 0.5),
        (0.5, 0.0, 0.4, 0.0),
    ],
)
def test_one_cycle(progress, warmup, until, expected):
    assert one_cycle(progress, warmup, until) == pytest.approx(expected)


def test_every_trainable_weight_is_in_exactly_one_group():
    model = SpeedNet(10, (8, 8, 8))
    grouped = [w for o in build_optimizers(model, Optim(), 100) for g in o.param_groups for w in g["params"]]
    assert {id(w) for w in grouped} == {id(w) for w in model.parameters() if w.requires_grad}
    assert len(grouped) == len({id(w) for w in grouped})


def test_weight_decay_is_per_image_whatever_the_learning_rate():
    optimizers = build_optimizers(SpeedNet(10, (8, 8, 8)), Optim(weight_decay=1e-6), batch_size=500)
    for group in optimizers[1].param_groups:
        assert group["lr_peak"] * group["weight_decay"] == pytest.approx(500e-6)


def test_whitening_bias_stops_and_then_costs_no_gradient():
    model, optim = SpeedNet(10, (8, 8, 8)), Optim(whiten_bias_until=0.4)
    optimizers = build_optimizers(model, optim, 100)
    bias = model.whiten.bias
    assert bias is not None
    set_learning_rates(optimizers, 0.2, warmup=0.0)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(optim.bias_lr / 2)
    assert bias.requires_grad
    assert set_learning_rates(optimizers, 0.4, warmup=0.0) == pytest.approx(0.6)
    assert not bias.requires_grad
    before = bias.clone()
    model(torch.randn(4, 3, 20, 20)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(bias, before)
