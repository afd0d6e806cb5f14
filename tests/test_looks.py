"""When the held-out images are looked at, and what the looks to come will cost."""

from itertools import pairwise
from typing import cast

import pytest

from fastcifar.budget import Pace
from fastcifar.loaders.loader import Loader
from fastcifar.looks import Looks
from fastcifar.settings import Stage

SOME = cast(Loader, object())  # images, at which nobody looks here


def looked(looks: Looks, steps: int) -> list[int]:
    """The steps after which a training of so many looks."""
    found = []
    for step in range(1, steps + 1):
        if looks.due(step, step / steps):
            looks.step, looks.progress = step, step / steps
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("epoch_steps", "steps", "expected"),
    [
        (50, 100, list(range(10, 101, 10))),
        (4, 100, list(range(4, 101, 4))),
        (6, 20, list(range(2, 21, 2))),
        (4, 42, [*range(4, 41, 4), 42]),
        (50, 3, [1, 2, 3]),
    ],
    ids=["two epochs", "many epochs", "uneven", "a part of an epoch at the end", "hardly any steps"],
)
def test_every_epoch_or_tenth_and_the_end(epoch_steps, steps, expected):
    assert looked(Looks(SOME, epoch_steps), steps) == expected


def test_without_images_there_is_nothing_to_look_at():
    assert looked(Looks(None, 5), 20) == []
    assert Looks(None, 5, cost_s=1.0).ahead_s(20) == 0


@pytest.mark.parametrize("epoch_steps", [7, 40, 5000], ids=["long", "middling", "short"])
def test_the_cost_of_the_looks_to_come_is_known(epoch_steps):
    looks = Looks(SOME, epoch_steps, cost_s=2.0)
    ahead = looks.ahead_s(100)
    assert ahead == 2 * len(looked(looks, 100))
    assert looks.ahead_s(100) == 0


@pytest.mark.parametrize("cost_s", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("epoch_steps", [20, 400])
@pytest.mark.parametrize("guess", [0.5, 1.0, 1.5])
def test_a_budget_with_looks_is_kept_and_used_evenly(cost_s, epoch_steps, guess):
    """60 s of steps of 0.1 s, looks of up to 3 s whose time was guessed wrong before the first."""
    looks = Looks(SOME, epoch_steps, cost_s=cost_s * guess)
    pace = Pace((Stage(32, 1.0),), [], deadline_s=60.0, pauses_s=looks.ahead_s)
    now_s, step, made = 0.0, 0, []
    while pace.progress(step) < 1:
        now_s, step = now_s + 0.1, step + 1
        pace.measured(step, 32, 0.1, now_s)
        progress = pace.progress(step)
        made.append(progress)
        if looks.due(step, progress):
            now_s += cost_s
            looks.step, looks.progress, looks.cost_s = step, progress, cost_s
    assert 54 <= now_s <= 60.4
    strides = [after - before for before, after in pairwise(made[5:])]
    assert max(strides) < 2.5 * min(strides), "no dash at the end"
