"""Members of an ensemble: each learns as it would alone, and together they answer with the mean of their logits."""

import json
import time
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from fastcifar.budget import Knot, Pace
from fastcifar.display import Display
from fastcifar.evaluate import answer
from fastcifar.job import Job
from fastcifar.looks import Looks
from fastcifar.models.build import build_model
from fastcifar.models.ensemble import Ensemble
from fastcifar.optim.schedule import build_optimizers
from fastcifar.planner.choose import arithmetic
from fastcifar.recipes import find_recipe
from fastcifar.reevaluate import reevaluate
from fastcifar.run import RunFolder
from fastcifar.settings import Augment, CnnModel, Recipe, SpeedNetModel, Stage, Tta
from fastcifar.setup import Setup, set_up
from fastcifar.train import Position, fit, train

SPEED = Recipe(
    batch_size=128,
    members=2,
    model=SpeedNetModel(widths=(32, 32, 32)),
    augment=Augment(crop_px=2),
    stages=(Stage(20, 0.5), Stage(32, 1.0)),
    tta=Tta(share=0.2),
)
CNN = replace(find_recipe("cnn4"), batch_size=125, members=3, model=CnnModel(blocks=((8,), (16,)), dropout=0.0))


def rows_of(setup: Setup, steps: int = 6) -> list[dict]:
    pace = Pace(setup.recipe.stages, [Knot(0, 0.0, steps)])
    found = fit(setup, setup.recipe, pace, Position(), Looks(None, len(setup.loader)))
    return [row for rows in found for row in rows]


@pytest.mark.parametrize("mix", ["none", "cutmix"])
@pytest.mark.parametrize("recipe", [SPEED, CNN], ids=["speed", "cnn"])
def test_each_member_learns_as_it_would_alone(recipe, mix, small_cifar):
    recipe = replace(recipe, mix=mix)
    job = Job("any", recipe, data=small_cifar, device="cpu", steps=6)
    setup = set_up(job, Display())
    assert isinstance(setup.model, Ensemble)
    alone = []
    for member in setup.model.members:
        one = replace(recipe, members=1)
        model = deepcopy(member)
        optimizers = build_optimizers(model, one.optim, one.batch_size)
        alone.append(replace(setup, recipe=one, model=model, forward=model, optimizers=optimizers))
    random = torch.get_rng_state()
    together = rows_of(setup)
    apart = []
    for lone in alone:
        torch.set_rng_state(random)  # cutmix draws from it
        apart.append(rows_of(lone))
    for member, lone in zip(setup.model.members, alone, strict=True):
        assert all(torch.equal(member.state_dict()[name], value) for name, value in lone.model.state_dict().items())
    first, second = (model.state_dict() for model in list(setup.model.members)[:2])
    assert any(not torch.equal(value, second[name]) for name, value in first.items())
    for row, *rows in zip(together, *apart, strict=True):
        for what in ("loss", "accuracy"):
            assert row[what] == pytest.approx(sum(each[what] for each in rows) / recipe.members, rel=1e-5)


@pytest.mark.parametrize("recipe", [SPEED, CNN], ids=["speed", "cnn"])
def test_its_answer_is_the_mean_of_the_members_logits(recipe):
    model = build_model(recipe, classes=7, seed=0).eval()
    assert isinstance(model, Ensemble)
    x_BCHW = torch.randn(5, 3, 32, 32).to(memory_format=torch.channels_last)
    expected_BK = sum(answer(member, x_BCHW) for member in model.members) / recipe.members
    torch.testing.assert_close(answer(model, x_BCHW), expected_BK)


def test_it_costs_its_members():
    assert arithmetic(SPEED) == 2 * arithmetic(replace(SPEED, members=1))


def test_a_run_is_written_and_judged_again(small_cifar, tmp_path):
    job = Job("speed", SPEED, data=small_cifar, device="cpu", steps=6)
    result = train(job, RunFolder.create(tmp_path / "run", "speed"), Display(), time.monotonic())
    assert result == json.loads((tmp_path / "run/result.json").read_text())
    assert result["params"] == 2 * sum(
        weight.numel() for weight in build_model(replace(SPEED, members=1), 10, 0).parameters()
    )
    found = reevaluate(tmp_path / "run", job, Display())
    assert (found["test_acc"], found["test_acc_tta"]) == (result["test_acc"], result["test_acc_tta"])
