"""Who learns how fast, when."""

import pytest
import torch

from fastcifar.errors import UsageError
from fastcifar.models.dynamicnet import build_dynamicnet
from fastcifar.models.speednet import SpeedNet
from fastcifar.optim.schedule import build_optimizers, lr_share, one_cycle, set_learning_rates
from fastcifar.settings import ClassicOptim, SpeedOptim


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
    grouped = [w for o in build_optimizers(model, SpeedOptim(), 100) for g in o.param_groups for w in g["params"]]
    assert {id(w) for w in grouped} == {id(w) for w in model.parameters() if w.requires_grad}
    assert len(grouped) == len({id(w) for w in grouped})


def test_weight_decay_is_per_image_whatever_the_learning_rate():
    optimizers = build_optimizers(SpeedNet(10, (8, 8, 8)), SpeedOptim(weight_decay=1e-6), batch_size=500)
    for group in optimizers[1].param_groups:
        assert group["lr_peak"] * group["weight_decay"] == pytest.approx(500e-6)


def test_whitening_bias_stops_and_then_costs_no_gradient():
    model, optim = SpeedNet(10, (8, 8, 8)), SpeedOptim(whiten_bias_until=0.4)
    optimizers = build_optimizers(model, optim, 100)
    bias = model.whiten.bias
    assert bias is not None
    set_learning_rates(optimizers, 0.2, optim)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(optim.bias_lr / 2)
    assert bias.requires_grad
    assert set_learning_rates(optimizers, 0.4, optim) == pytest.approx(0.6)
    assert not bias.requires_grad
    before = bias.clone()
    model(torch.randn(4, 3, 20, 20)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(bias, before)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("one-cycle", [0, 0.5, 1, 0.5, 0]),
        ("cosine", [1, 0.85355, 0.5, 0.14645, 0]),
        ("step", [1, 1, 0.1, 0.1, 0.01]),
    ],
)
def test_schedules(schedule, expected):
    optim = ClassicOptim(schedule=schedule, warmup=0.5, step=0.5)
    assert [lr_share(optim, quarter / 4) for quarter in range(5)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_classic_optimizers_are_those_of_torch(name):
    """One step by hand, with weight decay where each of them puts it."""
    weight = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        weight.weight.fill_(2.0)
    optim = ClassicOptim(name=name, lr=0.1, weight_decay=0.5, momentum=0.9, nesterov=False)
    (optimizer,) = build_optimizers(weight, optim, batch_size=100)
    weight(torch.ones(1, 1)).sum().backward()  # gradient 1
    optimizer.step()
    expected = {"adam": 2 - 0.1, "adamw": 2 * (1 - 0.1 * 0.5) - 0.1, "sgd": 2 - 0.1 * (1 + 0.5 * 2)}[name]
    assert weight.weight.item() == pytest.approx(expected, abs=1e-5)


def test_muon_takes_the_filters_expert_by_expert_and_adamw_the_rest():
    model = build_dynamicnet(10, groups=((8, 8), (16,)), experts=3)
    optim = ClassicOptim(name="muon", lr=0.01, muon_lr=0.2, momentum=0.6, schedule="one-cycle", warmup=0.5)
    muon, adamw = optimizers = build_optimizers(model, optim, batch_size=4)
    filters = {weight: group["experts"] for group in muon.param_groups for weight in group["params"]}
    assert sorted(tuple(weight.shape) for weight in filters) == [
        (8, 3, 1, 1), (16, 8, 1, 1), (24, 3, 3, 3), (24, 8, 3, 3), (48, 8, 3, 3)]  # fmt: skip
    assert {experts for weight, experts in filters.items() if weight.size(2) == 3} == {3}
    assert {experts for weight, experts in filters.items() if weight.size(2) == 1} == {1}
    rest = {weight for group in adamw.param_groups for weight in group["params"]}
    assert isinstance(adamw, torch.optim.AdamW)
    assert not rest & {*filters}
    assert rest | {*filters} == {*model.parameters()}
    set_learning_rates(optimizers, 0.25, optim)
    assert {group["lr"] for group in muon.param_groups} == {0.1}
    assert {group["lr"] for group in adamw.param_groups} == {0.005}


def test_muon_without_filters_is_refused_by_name():
    with pytest.raises(UsageError, match=r"--optim\.name: muon .* has none") as caught:
        build_optimizers(torch.nn.Linear(4, 2), ClassicOptim(name="muon"), batch_size=4)
    assert caught.value.hint == "--optim.name adamw"
