"""From a budget to what to train with it: recipe, data type, batch size, second look, and the accuracy to expect.

plan = choose("cifar10", images=50_000, classes=10, device=device, budget_s=300, spent_s=2.5)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastcifar.budget import REPORT_S
from fastcifar.evaluate import looks_an_image, plan_tta
from fastcifar.models.build import build_model
from fastcifar.planner.curve import TEST_IMAGES, Curve, Expectation, expect, load_curves
from fastcifar.planner.rates import Rates, fastest_dtype, measure_rates
from fastcifar.recipes import find_recipe
from fastcifar.settings import Recipe

# By what they cost. One is measured only if it might be better than the best before it.
LADDER = ("speed-narrow", "speed", "speed-wide", "speed-pair")
OPTIMISM = 1.5  # by this factor a recipe may be cheaper than its arithmetic says, beside the one measured before it
SETUP_S = 1.0  # from the plan to the first step: 0.6 s on a quiet machine
COMPILE_S = 40.0  # that torch.compile takes of it on a GPU: a guess, none was at hand
COMPILE_FROM_S = 180.0  # a shorter budget is spent without: its steps are CUDA graphs all the same
SMALLEST_BATCH = 128  # below it the fixed costs of a step, 25 ms for Muon alone, are most of it


@dataclass(frozen=True)
class Choice:
    """A recipe with its batch size, data type and second look fitted to the budget, and what it is expected to reach.

    Args:
        train_s: of the budget, for steps.
        epochs, steps: what those seconds are expected to buy.
        expected: None for a data set that no curve was measured on.
    """

    name: str
    recipe: Recipe
    rates: Rates
    train_s: float
    epochs: float
    steps: int
    expected: Expectation | None

    def __str__(self) -> str:
        expected = f", expected on CIFAR's test images {self.expected}" if self.expected else ""
        return f"{self.name}, about {self.epochs:.1f} epochs in batches of {self.recipe.batch_size}{expected}"


def choose(
    dataset: str, images: int, classes: int, device: torch.device, budget_s: float, spent_s: Callable[[], float]
) -> list[Choice]:
    """The recipes that were looked into, the one to train first.

    Args:
        images: to train on.
        spent_s: seconds of the budget gone by now.
    """
    curves = load_curves(dataset)
    names = [name for name in LADDER if name in curves] or ["speed"]
    dtype = fastest_dtype(find_recipe(names[0]), classes, device)
    looked: list[Choice] = []
    for name in names:
        recipe = suit(find_recipe(name), dtype, device, budget_s)
        if looked and not might_win(recipe, curves[name], looked[-1], max(map(surely, looked))):
            break
        rates = measure_rates(recipe, classes, device, budget_s)
        ahead_s = COMPILE_S if device.type == "cuda" and recipe.compile != "off" else 0.0
        looked.append(fit(name, recipe, rates, curves.get(name), images, budget_s, budget_s - spent_s() - ahead_s))
    return sorted(looked, key=surely, reverse=True)


def suit(recipe: Recipe, dtype: str, device: torch.device, budget_s: float) -> Recipe:
    """The same in this data type and, on a GPU with little time, without torch.compile."""
    short = device.type == "cuda" and budget_s < COMPILE_FROM_S
    return replace(recipe, dtype=dtype, compile="off" if short else recipe.compile)


def surely(choice: Choice) -> float:
    """The accuracy that it will hardly miss: beyond its longest training a curve is a guess, and no guess shall win."""
    return choice.expected.low if choice.expected else 0.0


def might_win(recipe: Recipe, curve: Curve, last: Choice, best: float) -> bool:
    """Whether this recipe, as fast as one can hope, would be better than the best so far."""
    images = last.steps * last.recipe.batch_size * arithmetic(last.recipe) / arithmetic(recipe) * OPTIMISM
    return expect(curve, images, last.rates.error).low > best


def arithmetic(recipe: Recipe) -> float:
    """Operations of the network for an image of 32 pixels."""
    with torch.device("meta"):
        model = build_model(recipe, classes=10, seed=0).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32))
    return counter.get_total_flops()


def fit(
    name: str, recipe: Recipe, rates: Rates, curve: Curve | None, images: int, budget_s: float, left_s: float
) -> Choice:
    """What `left_s` seconds buy of this recipe."""
    tta = plan_tta(recipe.tta, rates.look_s, TEST_IMAGES, budget_s)
    train_s = max(0.0, left_s - SETUP_S - REPORT_S - rates.look_s * TEST_IMAGES * looks_an_image(tta))
    recipe = replace(recipe, tta=tta)
    recipe = replace(recipe, batch_size=fit_batch_size(recipe, train_s / rates.mean_image_s(recipe)))
    seen = train_s / rates.mean_image_s(recipe)
    expected = expect(curve, seen, rates.error) if curve else None
    return Choice(name, recipe, rates, train_s, seen / images, round(seen / recipe.batch_size), expected)


def fit_batch_size(recipe: Recipe, images: float) -> int:
    """The recipe's batch size, or a half, quarter ... of it where so many images would be too few steps."""
    batch_size = recipe.batch_size
    while images / batch_size < recipe.min_steps and batch_size >= 2 * SMALLEST_BATCH:
        batch_size //= 2
    return batch_size
