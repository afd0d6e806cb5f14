"""What surrounds the recording of a step. A CUDA graph itself needs a GPU: here, its replay does the step again."""

from dataclasses import replace

import pytest
import torch

from fastcifar import graphs
from fastcifar.budget import Knot, Pace, Position, stage_at
from fastcifar.display import Display
from fastcifar.graphs import StepGraphs, can_record, turning_points, untouched
from fastcifar.job import Job
from fastcifar.looks import Looks
from fastcifar.optim.schedule import set_learning_rates
from fastcifar.recipes import find_recipe
from fastcifar.resize import resize
from fastcifar.settings import MlpModel, Recipe, SpeedNetModel, SpeedOptim, Stage
from fastcifar.setup import Setup, set_up
from fastcifar.train import fit, train_step

RECIPE = Recipe(
    batch_size=16,
    dtype="float32",
    model=SpeedNetModel(widths=(8, 8, 8)),
    stages=(Stage(18, 0.3), Stage(20, 0.7), Stage(32, 1.0)),
    optim=SpeedOptim(whiten_bias_until=0.5),
)
STEPS = 12


@pytest.fixture
def recorded(monkeypatch):
    """Stands in for `record`: as often warmed up, and a replay that leaves its results in the same tensors."""

    def record(work):
        for _ in range(graphs.WARM_UPS):
            work()
        outputs = tuple(torch.empty_like(output) for output in work())

        def replay():
            for output, value in zip(outputs, work(), strict=True):
                output.copy_(value)

        return replay, outputs

    monkeypatch.setattr(graphs, "record", record)


def made(small_cifar) -> Setup:
    setup = set_up(Job("speed", RECIPE, data=small_cifar, device="cpu", steps=STEPS), Display())
    for optimizer in setup.optimizers:  # as on a GPU
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    return setup


def plain_step(setup: Setup):
    return lambda x, y, px: train_step(setup, RECIPE, resize(x, px), y)


def graphed_step(setup: Setup, recipe: Recipe = RECIPE) -> StepGraphs:
    x_BCHW = setup.loader.take(torch.arange(RECIPE.batch_size))
    return StepGraphs(plain_step(setup), recipe, setup.model, setup.optimizers, x_BCHW, setup.loader.labels_N[:16])


def losses(setup: Setup, step) -> list[torch.Tensor]:
    found = []
    for number, (x_BCHW, y_B) in zip(range(STEPS), setup.loader.epoch(0), strict=False):
        progress = number / STEPS
        set_learning_rates(setup.optimizers, progress, RECIPE.optim)
        found.append(step(x_BCHW, y_B, stage_at(RECIPE.stages, progress).image_px)[0])
    return found


def test_replayed_steps_train_as_plain_ones_do(recorded, small_cifar):
    """All results are looked at in the end only: a replay must not have written over those of the one before."""
    plain, graphed = made(small_cifar), made(small_cifar)
    expected, found = losses(plain, plain_step(plain)), losses(graphed, graphed_step(graphed))
    assert [float(loss) for loss in found] == [float(loss) for loss in expected]
    assert len({float(loss) for loss in found}) == STEPS
    for name, value in plain.model.state_dict().items():
        assert torch.equal(graphed.model.state_dict()[name], value), name


def test_a_graph_for_each_size_and_set_of_weights_that_learn(recorded, small_cifar):
    step = graphed_step(made(small_cifar))
    everything = max(learning for _, learning in step.recorded)
    but_the_whitening_bias = everything - 1
    assert set(step.recorded) == {
        (18, everything),
        (20, everything),
        (20, but_the_whitening_bias),
        (32, everything - 1),
    }
    assert all(weight.requires_grad for weight in step.weights), "none has stopped learning before the first step"


def test_every_step_of_a_training_has_its_graph(recorded, small_cifar, monkeypatch):
    """Also where one step is the first of an image size and the first without the whitening bias, or nearly both."""
    for until in (0.3, 0.31, 0.35, 0.7):
        recipe = replace(RECIPE, optim=SpeedOptim(whiten_bias_until=until))
        for steps in (3, 4, 7, 10):
            setup = set_up(Job("speed", recipe, data=small_cifar, device="cpu", steps=steps), Display())
            monkeypatch.setattr("fastcifar.train.ready_step", lambda setup, recipe: graphed_step(setup, recipe))
            pace = Pace(recipe.stages, [Knot(0, 0.0, steps)])
            done = [row for rows in fit(setup, recipe, pace, Position(), Looks(None, 100)) for row in rows]
            assert len(done) == steps


def test_recording_leaves_no_trace(recorded, small_cifar):
    setup = made(small_cifar)
    for _ in range(2):  # without and with momentum from earlier steps
        before = {name: (value.data_ptr(), value.clone()) for name, value in setup.model.state_dict().items()}
        momenta = [value.clone() for value in graphs.state_of(setup.optimizers)]
        random = torch.get_rng_state()
        graphed_step(setup)
        for name, value in setup.model.state_dict().items():
            assert value.data_ptr() == before[name][0], name
            assert torch.equal(value, before[name][1]), name
        after = list(graphs.state_of(setup.optimizers))
        for value, expected in zip(after, momenta or [torch.zeros_like(value) for value in after], strict=True):
            assert torch.equal(value, expected)
        assert torch.equal(torch.get_rng_state(), random)
        losses(setup, plain_step(setup))


def test_random_numbers_are_given_back():
    model = torch.nn.Linear(2, 2)
    expected = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    with untouched(model, []):
        torch.rand(5)
    assert torch.rand(1) == torch.rand(1, generator=expected)


def test_a_graph_is_needed_wherever_the_step_changes(small_cifar):
    assert turning_points(RECIPE, made(small_cifar).optimizers) == [0.0, 0.3, 0.5, 0.7]


def test_what_a_graph_cannot_hold():
    recipe = find_recipe("speed")
    assert can_record(recipe)
    assert not can_record(replace(recipe, dtype="float16"))
    assert not can_record(replace(recipe, mix="mixup"))
    assert can_record(replace(recipe, model=MlpModel(dropout=0.5))), "CUDA's generators count on in a graph"
