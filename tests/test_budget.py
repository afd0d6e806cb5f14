"""Durations, and a pace that ends in time whatever the machine does."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.budget import Knot, Pace, parse_duration, stage_at
from fastcifar.errors import UsageError
from fastcifar.settings import Stage

STAGES = (Stage(20, 0.3), Stage(24, 0.6), Stage(32, 1.0))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("5min", 300), ("5m", 300), ("1h30m", 5400), ("1h 30min", 5400), ("2.5min", 150), ("0.5s", 0.5)],
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "min", "5 minutes or so", "-5min", "0s", "5min!", "1h30"])
def test_other_words_are_refused(text):
    with pytest.raises(UsageError, match="--budget"):
        parse_duration(text)


def simulate(pace: Pace, step_s, start_s: float) -> tuple[float, list[float], list[int]]:
    """Run a pace against a simulated clock; returns when it ended, and the progress and image size of every step."""
    now_s, step, progress, sizes = start_s, 0, [], []
    while pace.progress(step) < 1:
        image_px = stage_at(pace.stages, pace.middle(step)).image_px
        progress.append(pace.progress(step))
        sizes.append(image_px)
        took_s = step_s(step, image_px)
        now_s += took_s
        step += 1
        pace.measured(step, image_px, took_s, now_s)
    return now_s, progress, sizes


@settings(max_examples=200, deadline=None)
@given(
    budget_s=st.floats(20, 400),
    base_s=st.floats(0.05, 0.3),
    slope=st.floats(0.5, 2.0),
    noise=st.floats(0, 0.1),
    slow_first=st.floats(1, 4),
    seed=st.integers(0, 1000),
)
def test_a_budget_is_kept_and_used(budget_s, base_s, slope, noise, slow_first, seed):
    """Whatever the real costs of the image sizes, with noise and slow first steps, 92-101 % of the time is used."""
    rng, seen = random.Random(seed), set()

    def step_s(step, image_px):
        first = slow_first if image_px not in seen else 1
        seen.add(image_px)
        return base_s * (image_px / 20) ** slope * first * (1 + noise * rng.uniform(-1, 1))

    ended_s, progress, sizes = simulate(pace := Pace(STAGES, [], deadline_s=budget_s), step_s, start_s=1.0)
    largest_s = base_s * 1.6**slope * (1 + noise)
    assert ended_s <= budget_s + 1.0 * largest_s
    assert ended_s >= 0.95 * budget_s - 2.5 * largest_s
    assert progress == sorted(progress)
    assert sizes == sorted(sizes)
    assert set(sizes) == {20, 24, 32}
    assert progress[-1] >= 1 - 2.5 / len(progress), "the learning rate of the last step must be near its end"
    assert pace.steps == len(progress)


def test_a_plan_replays_step_by_step():
    rng = random.Random(0)
    first = Pace(STAGES, [], deadline_s=100.0)
    _, progress, sizes = simulate(first, lambda step, px: px / 60 * rng.uniform(0.8, 1.4), 0.0)
    assert len(first.knots) > 1, "the noise was meant to force a new plan"
    replay = Pace(STAGES, first.knots)
    assert simulate(replay, lambda *_: 1e9, 0.0)[1:] == (progress, sizes)


def test_a_slower_machine_halfway_still_ends_in_time():
    pace = Pace(STAGES, [], deadline_s=100.0)
    ended_s, progress, _ = simulate(pace, lambda step, _: 0.2 if step < 150 else 0.6, 0.0)
    assert ended_s <= 100.6
    assert progress[-1] > 0.97


def test_fixed_length_is_even():
    pace = Pace(STAGES, [Knot(0, 0.0, 10)])
    assert [pace.progress(step) for step in range(11)] == [step / 10 for step in range(11)]
    assert [stage_at(STAGES, pace.progress(step)).image_px for step in range(10)] == [20] * 3 + [24] * 3 + [32] * 4


def test_sizes_get_the_shares_of_steps_that_they_should_where_their_costs_are_known():
    """By guess, images of 20 pixels had 0.38 of a Zen 4's steps instead of 0.3: those of 32 cost more than guessed."""
    cost_s = {20: 0.321, 24: 0.55, 32: 0.87}
    shares = {}
    for known, pace in (
        (False, Pace(STAGES, [], deadline_s=290.0)),
        (True, Pace(STAGES, [], deadline_s=290.0, cost=cost_s.__getitem__)),
    ):
        ended_s, _, sizes = simulate(pace, lambda step, image_px: cost_s[image_px], 0.0)
        assert 285 < ended_s < 291
        shares[known] = [sizes.count(px) / len(sizes) for px in cost_s]
    assert shares[True] == pytest.approx([0.3, 0.3, 0.4], abs=0.01)
    assert shares[False] != pytest.approx([0.3, 0.3, 0.4], abs=0.03)


def test_a_slow_first_step_at_a_new_size_is_no_reason_to_hurry():
    """Only the time it took is gone; the steps after it are expected at the usual pace."""
    seen = set()

    def step_s(_, image_px):
        first = image_px not in seen
        seen.add(image_px)
        return (2.5 if first else 1) * 0.2 * (250 + image_px**2) / 650

    pace = Pace(STAGES, [], deadline_s=100.0)
    _, progress, _ = simulate(pace, step_s, 0.0)
    rises = [after - before for before, after in pairwise(progress[5:])]
    assert max(rises) < 1.2 * min(rises)
