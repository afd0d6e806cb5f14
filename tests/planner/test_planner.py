"""What a budget is spent on: curves, the rates of this machine, and the choice between recipes."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcifar import setup
from fastcifar.display import Display
from fastcifar.evaluate import looks_an_image
from fastcifar.job import Job
from fastcifar.planner import choose as planner
from fastcifar.planner import rates
from fastcifar.planner.choose import LADDER, Choice, arithmetic, choose, fit_batch_size
from fastcifar.planner.curve import EPOCH_IMAGES, Curve, Expectation, expect, load_curves
from fastcifar.planner.rates import Rates, measure_rates
from fastcifar.recipes import find_recipe
from fastcifar.settings import Recipe, SpeedNetModel, Stage

CPU = torch.device("cpu")
CURVES = st.builds(
    Curve,
    start=st.just(0.9),
    floor=st.floats(0.01, 0.3),
    half=st.floats(0.05, 5),
    power=st.floats(0.5, 2),
    spread=st.floats(0.001, 0.1),
    bends=st.floats(1, 30).map(lambda epochs: ((epochs / 8, 1.05), (epochs, 1.0))),
    images=st.sampled_from([5000, 50_000]),
)


@given(CURVES, st.floats(0.01, 1000), st.floats(0.01, 1000))
def test_more_training_is_expected_to_be_better_and_never_leaves_its_interval(curve, some, more):
    some, more = sorted((some, more))
    assert curve.error(some) >= curve.error(more) >= curve.floor
    seen = expect(curve, some * EPOCH_IMAGES, pace_error=0.15)
    assert seen.low < seen.accuracy < seen.high <= 1


def test_the_interval_holds_95_of_100_trainings():
    """Simulated: seeds scatter by the spread, the epochs by the pace, and 10,000 images are drawn."""
    curve = Curve(start=0.9, floor=0.05, half=0.6, power=1.4, spread=0.03, bends=((8.0, 1.0),), images=10**9)
    seen = expect(curve, 8 * EPOCH_IMAGES, pace_error=0.15)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, 2, generator=generator)
    errors = [curve.error(8.0 * (1 + 0.15 / 1.96 * pace)) * (1 + curve.spread * seed) for pace, seed in normal.tolist()]
    counted = torch.binomial(torch.full((4000,), 10_000.0), torch.tensor(errors), generator=generator) / 10_000
    inside = ((counted >= 1 - seen.high) & (counted <= 1 - seen.low)).float().mean().item()
    assert 0.93 <= inside <= 0.97


def test_the_interval_grows_beyond_the_longest_training():
    curve = Curve(start=0.9, floor=0.05, half=0.6, power=1.4, spread=0.03, bends=((8.0, 1.0),), images=10**9)
    seen = [expect(curve, epochs * EPOCH_IMAGES, 0.15) for epochs in (8, 16, 32)]
    widths = [(each.high - each.low) / (1 - each.accuracy) for each in seen]
    assert widths[0] + 0.15 < widths[1] < widths[2] - 0.15


def test_the_curves_of_the_repository_are_read():
    for dataset in ("cifar10", "cifar100"):
        curves = load_curves(dataset)
        assert set(curves) <= set(LADDER)
        assert {"speed"} <= set(curves)
    assert set(load_curves("cifar10")) == set(LADDER)
    assert load_curves("shapes10") == {}


def fake_rates(monkeypatch, speed: float, error: float = 0.15) -> list[Recipe]:
    """A machine that computes `speed` operations a second, and the recipes that were measured on it."""
    measured = []

    def rates(recipe, classes, device, budget_s):
        measured.append(recipe)
        image_s = 3 * arithmetic(recipe) / speed
        by_side_s = {20: 0.4 * image_s, 24: 0.6 * image_s, 32: image_s}
        return Rates(step_s=0.0, image_s=by_side_s, look_s=image_s / 3, first_s=0.0, error=error)

    monkeypatch.setattr(planner, "measure_rates", rates)
    monkeypatch.setattr(planner, "fastest_dtype", lambda *_: "bfloat16")
    return measured


def plan(budget_s: float):
    return choose("cifar10", 50_000, 10, CPU, budget_s, lambda: 2.0)


def test_a_larger_budget_expects_more_and_takes_no_smaller_network(monkeypatch):
    fake_rates(monkeypatch, speed=2e12)
    choices = [plan(budget_s)[0] for budget_s in (15, 60, 300, 900, 3600)]
    expected = [choice.expected.accuracy for choice in choices if choice.expected]
    assert expected == sorted(expected)
    places = [LADDER.index(choice.name) for choice in choices]
    assert places == sorted(places)
    assert places[0] < places[-1]
    for choice in choices:
        assert choice.train_s < 3600
        assert choice.steps == pytest.approx(choice.epochs * 50_000 / choice.recipe.batch_size, abs=1)


def test_the_interval_is_wider_where_rates_change(monkeypatch):
    fake_rates(monkeypatch, speed=2e12)
    steady = plan(60)[0].expected
    fake_rates(monkeypatch, speed=2e12, error=0.5)
    changing = plan(60)[0].expected
    assert steady is not None
    assert changing is not None
    assert changing.accuracy == steady.accuracy
    assert changing.low < steady.low
    assert changing.high > steady.high


@pytest.mark.parametrize(
    ("dtype", "is_here", "changes"), [("bfloat16", True, 0.5), ("bfloat16", False, 0.15), ("float32", True, 0.15)]
)
def test_rates_change_more_on_a_matrix_unit(dtype, is_here, changes, monkeypatch):
    monkeypatch.setattr(rates.amx, "available", lambda: is_here)
    model = SpeedNetModel(widths=(32, 32, 32), own_kernels=False)
    recipe = replace(find_recipe("speed"), model=model, dtype=dtype, batch_size=2)
    assert measure_rates(recipe, classes=10, device=CPU, budget_s=0.1).error == changes


def test_training_and_evaluation_fill_the_budget(monkeypatch):
    fake_rates(monkeypatch, speed=2e12)
    best = plan(300)[0]
    evaluation_s = best.rates.look_s * 10_000 * looks_an_image(best.recipe.tta)
    assert best.train_s + evaluation_s == pytest.approx(300 - 2 - planner.SETUP_S - planner.REPORT_S)
    assert best.epochs == pytest.approx(best.train_s / best.rates.mean_image_s(best.recipe) / 50_000)


def test_curves_know_epochs_of_45_000_images_and_easier_ones_than_the_test_images(monkeypatch):
    fake_rates(monkeypatch, speed=2e12)
    best = plan(300)[0]
    assert best.expected is not None
    error = load_curves("cifar10")[best.name].error(best.epochs * 50_000 / 45_000)
    assert 1 - best.expected.accuracy == pytest.approx(error + 0.004)


def test_what_cannot_win_is_not_measured(monkeypatch):
    measured = fake_rates(monkeypatch, speed=1e11)
    plan(15)
    assert len(measured) == 1
    measured.clear()
    plan(100_000)
    assert len(measured) == len(load_curves("cifar10"))


def test_the_best_comes_first(monkeypatch):
    fake_rates(monkeypatch, speed=2e12)
    expected = [choice.expected.low for choice in plan(600) if choice.expected]
    assert len(expected) > 1
    assert expected == sorted(expected, reverse=True)


def test_what_was_measured_beats_what_is_hoped_for(monkeypatch):
    """A budget buys 60 epochs of `speed`, whose curve ends at 16 and promises more, or 30 of `speed-wide`."""
    hoped = Curve(start=0.9, floor=0.03, half=0.05, power=0.7, spread=0.03, bends=((16.0, 1.0),), images=5000)
    measured = replace(hoped, floor=0.031, half=0.04, bends=((32.0, 1.0),))
    fake_rates(monkeypatch, speed=2e12)
    monkeypatch.setattr(planner, "load_curves", lambda _: {"speed": hoped, "speed-wide": measured})
    seconds = {find_recipe("speed").model: 900 / 60 / 50_000, find_recipe("speed-wide").model: 900 / 30 / 50_000}
    monkeypatch.setattr(
        planner,
        "measure_rates",
        lambda recipe, *_: Rates(0.0, dict.fromkeys((20, 24, 32), seconds[recipe.model]), look_s=1e-6, first_s=0.0),
    )
    first, second = plan(900)
    assert (first.name, second.name) == ("speed-wide", "speed")
    assert first.expected is not None
    assert second.expected is not None
    assert first.expected.accuracy < second.expected.accuracy


def test_a_data_set_without_curves_gets_speed_and_no_promise(monkeypatch):
    fake_rates(monkeypatch, speed=2e12)
    [only] = choose("shapes10", 50_000, 10, CPU, 60.0, lambda: 2.0)
    assert only.name == "speed"
    assert only.expected is None


def test_other_images_than_the_real_ones_are_promised_nothing(small_cifar, monkeypatch):
    recipe = replace(find_recipe("speed"), model=SpeedNetModel(widths=(16, 16, 16)), batch_size=50, dtype="float32")
    rates = Rates(step_s=0.0, image_s={20: 1e-4, 24: 1e-4, 32: 1e-4}, look_s=1e-4, first_s=0.0)
    choice = Choice("speed", recipe, rates, train_s=40.0, epochs=2.0, steps=10, expected=Expectation(0.9, 0.8, 0.95))
    monkeypatch.setattr(setup, "choose", lambda *_: [choice])
    made = setup.set_up(Job("auto", recipe, data=small_cifar, device="cpu", budget="60s"), Display())
    assert not made.dataset.verified
    assert made.choice == replace(choice, expected=None)


def test_few_images_get_smaller_batches():
    recipe = find_recipe("speed")
    assert [fit_batch_size(recipe, images) for images in (400_000, 80_000, 30_000, 2_000)] == [1024, 512, 256, 128]
    assert fit_batch_size(replace(recipe, min_steps=0), 2_000) == 1024


def test_arithmetic_grows_with_the_channels():
    """SpeedNet of 64, 256, 256 channels: 118 M multiplications and as many additions (LOG.md, the first recipe).

    Eight mixtures more in the first layer: 31 x 31 pixels x 8 x 9 x 64 for the convolution after it.
    """
    speed = find_recipe("speed")
    without = replace(speed, model=SpeedNetModel(mixtures=False))
    assert arithmetic(without) == pytest.approx(2 * 118e6, rel=0.02)
    assert arithmetic(speed) == pytest.approx(arithmetic(without) + 2 * 31**2 * 8 * (9 * 64 + 12))
    counted = [arithmetic(find_recipe(name)) for name in LADDER]
    assert counted == sorted(counted)


def test_a_mean_image_counts_the_shares_of_the_stages():
    recipe = replace(find_recipe("speed"), stages=(Stage(20, 0.5), Stage(26, 0.7), Stage(32, 1.0)), batch_size=100)
    rates = Rates(0.1, {20: 1e-3, 26: 4e-3, 32: 5e-3}, look_s=0.0, first_s=0.0)
    assert rates.mean_image_s(recipe) == pytest.approx(0.5 * 1e-3 + 0.2 * 4e-3 + 0.3 * 5e-3 + 0.1 / 100)
    assert rates.of_step(26, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("batch_size", [2, 40, 256])
def test_rates_are_measured(batch_size):
    recipe = replace(find_recipe("speed"), model=SpeedNetModel(widths=(32, 32, 32)), batch_size=batch_size)
    rates = measure_rates(recipe, classes=10, device=CPU, budget_s=60)
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in (*rates.image_s.values(), rates.look_s))
    assert set(rates.image_s) == {20, 24, 32}
    assert rates.step_s >= 0


@pytest.mark.parametrize("isa", ["AVX2", "SSE41"])
def test_a_cpu_without_instructions_for_bfloat16_trains_in_float32(isa):
    """oneDNN may be told which instructions there are; without those for bfloat16 it takes ten times as long."""
    code = (
        "import torch; from fastcifar.planner.rates import fastest_dtype; from fastcifar.recipes import find_recipe;"
        "print(fastest_dtype(find_recipe('speed'), 10, torch.device('cpu')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa},
        check=True,
    )
    assert done.stdout.strip() == "float32"


def test_a_plan_for_no_time_says_how_much_it_needs():
    done = subprocess.run([sys.executable, "-m", "fastcifar", "plan", "--budget", "2s"], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(r"try: --budget \d+s", done.stderr), done.stderr


def test_a_short_budget_on_a_gpu_is_not_spent_on_compiling():
    speed, gpu = find_recipe("speed"), torch.device("cuda")
    assert planner.suit(speed, "float32", gpu, 60.0) == replace(speed, dtype="float32", compile="off")
    assert planner.suit(speed, "bfloat16", gpu, 600.0) == speed
    assert planner.suit(speed, "bfloat16", torch.device("cpu"), 60.0) == speed


def test_plan_says_what_train_would_do():
    words = ["plan", "--budget", "3min", "--device", "cpu", "--json"]
    done = subprocess.run([sys.executable, "-m", "fastcifar", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout.splitlines()[-1])[0]
    assert re.match(rf"recipe +{best['name']}, ", done.stdout)
    assert re.search(r"fastcifar train --budget 3min --device cpu *\n", done.stdout)
    assert best["recipe"]["batch_size"] in (128, 256, 512, 1024)
    assert 0 <= best["expected"]["low"] < best["expected"]["accuracy"] < best["expected"]["high"] <= 1
    assert 0 < best["train_s"] < 180
