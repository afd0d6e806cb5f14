"""Accuracy against training, for the recipes that a budget may be spent on: curves through measured trainings.

`curves.json` holds them, for each data set and recipe, with the trainings they go through; `bench/curves.py` writes it.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

TEST_IMAGES = 10_000
EPOCH_IMAGES = 45_000  # of a curve's epoch: 5,000 of the training images were held out
# By how much more of the test images are wrong than of those held out: the mean of 96 trainings (LOG.md, 2026-11-30).
HARDER = {"cifar10": 0.004}
TWO_SIDED_95 = 1.96
BEYOND = 0.1  # share of the error by which a curve may be off for each doubling beyond its longest training


@dataclass(frozen=True)
class Curve:
    """The error rate falls from guessing (`start`) to `floor`, halfway there after `half` epochs, and bends a little:

    error(epochs) = (floor + (start - floor) / (1 + (epochs / half) ** power)) * bend(epochs)

    Args:
        spread: standard deviation of trainings around the unbent curve, as a share of the error.
        bends: epochs of the trainings beneath it, and by what the error measured there was more than the unbent curve
            says; between them it follows a straight line over the logarithm of the epochs, beyond them it stays.
        images: that the error was measured on.
        harder: by how much the error on the test images is more.
    """

    start: float
    floor: float
    half: float
    power: float
    spread: float
    bends: tuple[tuple[float, float], ...]
    images: int
    harder: float = 0.0

    @property
    def longest(self) -> float:
        """Epochs of the longest training beneath it."""
        return self.bends[-1][0]

    def unbent(self, epochs: float) -> float:
        return self.floor + (self.start - self.floor) / (1 + (epochs / self.half) ** self.power)

    def error(self, epochs: float) -> float:
        at, factors = zip(*self.bends, strict=True)
        return self.unbent(epochs) * float(np.interp(math.log(max(epochs, at[0] / 2)), np.log(at), factors))


@dataclass(frozen=True)
class Expectation:
    """The accuracy on the test images, 0..1, and an interval that is to hold 95 of 100 trainings."""

    accuracy: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ({self.low:.1%} to {self.high:.1%})"


def expect(curve: Curve, images: float, pace_error: float) -> Expectation:
    """What a training on so many images, however often each, comes to on the test images.

    Args:
        pace_error: by what share the images may turn out more or fewer.
    """
    epochs = images / EPOCH_IMAGES
    error = curve.error(epochs) + curve.harder
    # Seed and fit; which 10,000 images are asked, and on which the curve was measured; how many epochs it will be.
    chance = math.sqrt(error * (1 - error) * (1 / TEST_IMAGES + 1 / curve.images))
    pace = (curve.error(epochs * (1 - pace_error)) - curve.error(epochs * (1 + pace_error))) / 2 / TWO_SIDED_95
    reach = TWO_SIDED_95 * math.hypot(curve.spread * error, chance, pace)
    reach += BEYOND * max(0.0, math.log2(max(epochs, curve.longest) / curve.longest)) * error
    return Expectation(1 - error, 1 - error - reach, min(1.0, 1 - error + reach))


@cache
def load_curves(dataset: str) -> dict[str, Curve]:
    """The curves of a data set by the name of the recipe; none if there are none."""
    content = json.loads((files("fastcifar.planner") / "curves.json").read_text())
    harder = HARDER.get(dataset, 0.0)
    return {name: read_curve(entry["curve"] | {"harder": harder}) for name, entry in content.get(dataset, {}).items()}


def read_curve(fields: dict) -> Curve:
    """From its form in JSON, which knows no tuples."""
    numbers: dict[str, Any] = fields | {"bends": tuple(map(tuple, fields["bends"]))}
    return Curve(**numbers)
