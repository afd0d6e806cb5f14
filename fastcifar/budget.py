"""From "5min" to a training that ends in time, with its learning rate at its end.

A training makes progress from 0 to 1; learning rates and image sizes follow progress. `Pace` decides how much progress
a step makes: 1 / steps when the number of steps is given, else whatever the measured step times say will use up the
budget.
"""

import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from fastcifar.errors import UsageError
from fastcifar.settings import Stage

REPORT_S = 1.0  # kept of a budget for report.html, at least: importing matplotlib and drawing take 0.65 s
UNITS_S = {"h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str) -> float:
    """Seconds in "90s", "5min", "1h30m", "2.5min"; a bare number is refused, since nobody knows its unit.

    Raises UsageError.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(h|min|m|s)", text)
    if not parts or "".join(re.split(r"\s+", text)) != "".join(number + unit for number, unit in parts):
        raise UsageError(f"--budget: cannot read {text!r} as a time.", "--budget 90s, --budget 5min or --budget 1h30m")
    total_s = sum(float(number) * UNITS_S[unit] for number, unit in parts)
    if total_s <= 0:
        raise UsageError(f"--budget: {text!r} is no time at all.", "--budget 5min")
    return total_s


def overrun_s(budget_s: float) -> float:
    """How late a run may end, as the README promises."""
    return max(1.0, 0.02 * budget_s)


def refuse_hopeless(budget_s: float, left_s: float) -> None:
    """Raise UsageError if less than a fifth of the budget is left to train."""
    if left_s < 0.2 * budget_s:
        needed_s = math.ceil((budget_s - left_s) / 0.7)
        raise UsageError(
            f"--budget: set-up, looks and evaluation leave {max(0, left_s):.1f} s of {budget_s:g} s to train.",
            f"--budget {needed_s}s",
        )


@dataclass(frozen=True)
class Knot:
    """From step `step` on, progress rises evenly from `progress` to 1 at step `end`."""

    step: int
    progress: float
    end: int

    def at(self, step: int) -> float:
        if step >= self.end:
            return 1.0  # exactly: the quotient below can fall short by a rounding, and one step more would be taken
        return self.progress + (1 - self.progress) * (step - self.step) / (self.end - self.step)


@dataclass
class Position:
    """How far a training is."""

    step: int = 0
    train_s: float = 0.0
    compile_s: float = 0.0  # beyond what the set-up compiled


def stage_at(stages: tuple[Stage, ...], progress: float) -> Stage:
    """The stage at this progress; a step belongs to the one that its middle lies in."""
    return next((stage for stage in stages if progress < stage.until), stages[-1])


def guess_cost(image_px: int) -> float:
    """Relative time of a step on images of this size, where nothing has been measured yet.

    Fitted on 2 CPU cores: 0.82, 1.10 and 1.65 s for 2,000 images of 20, 24 and 32 pixels (LOG.md, 2026-11-20).
    """
    return 250 + image_px**2


class Pace:
    """How far a training is after each step.

    Args:
        stages: image sizes and the progress up to which each is used.
        knots: the plan so far: one knot for a run of fixed length, those of an earlier run to replay or resume it.
        deadline_s: when the last step must have ended, on the caller's clock; None for a run of fixed length.
        pauses_s: what else than steps will take until then, in seconds, for a training of so many steps.
        cost: what a step takes at each image size beside the others, as far as that is known beforehand.
    """

    HEADROOM = 0.01  # share of the time left that is not planned for: steps scatter by a few percent
    SLACK = 0.03  # replan when more than this share of the time left would stay unused

    def __init__(
        self,
        stages: tuple[Stage, ...],
        knots: list[Knot],
        deadline_s: float | None = None,
        pauses_s: Callable[[int], float] = lambda steps: 0.0,
        cost: Callable[[int], float] = guess_cost,
    ):
        self.stages, self.knots, self.deadline_s, self.pauses_s = stages, list(knots), deadline_s, pauses_s
        self.cost = cost
        self.first_s: dict[int, float] = {}  # what the first step at an image size took
        self.recent_s: dict[int, deque[float]] = {}  # and the latest ones after it

    @property
    def steps(self) -> int:
        """The number of steps of the whole training, as planned now."""
        return self.knots[-1].end if self.knots else 1

    def progress(self, step: int) -> float:
        """Progress before step `step`, 0 to 1. Before the first measurement all that is known is where it starts."""
        if step == 0 or not self.knots:
            return 0.0
        return min(1.0, next(knot for knot in reversed(self.knots) if knot.step <= step).at(step))

    def middle(self, step: int) -> float:
        """Progress halfway through a step: where its learning rate is read, so that the last one's is near the end.

        The first step has no middle, because a budget's plan is only made after it.
        """
        return (self.progress(step) + self.progress(step + 1)) / 2 if step else 0.0

    def cost_s(self, image_px: int) -> float:
        """Seconds a step takes at this size: measured, or scaled from the nearest size that was.

        The first step at a size pays for memory and kernels that the later ones find ready, 2-3 times as long, so it
        is believed only while there is nothing else.
        """
        settled = [px for px in self.recent_s if self.recent_s[px]]
        nearest_px = min(settled or self.first_s, key=lambda px: abs(px - image_px))
        seconds = median(self.recent_s[nearest_px]) if settled else self.first_s[nearest_px]
        return seconds * self.cost(image_px) / self.cost(nearest_px)

    def surcharge_s(self, image_px: int) -> float:
        """What the first step at a size that is still to come will take on top, judged by the last such step."""
        if image_px in self.first_s or not (known := [px for px in self.first_s if self.recent_s[px]]):
            return 0.0
        last_px = known[-1]
        extra_s = max(0.0, self.first_s[last_px] - self.cost_s(last_px))
        return extra_s * self.cost(image_px) / self.cost(last_px)

    def expect(self, progress: float) -> tuple[float, float]:
        """(seconds of an average step from here to the end, seconds of all surcharges to come)."""
        total_s, begin = 0.0, progress
        for stage in self.stages:
            share = max(0.0, stage.until - begin)
            total_s += share * self.cost_s(stage.image_px)
            begin += share
        ahead = {stage.image_px for stage in self.stages if stage.until > progress}
        return total_s / (1 - progress), sum(map(self.surcharge_s, ahead))

    def left_s(self, step: int) -> float:
        """Expected seconds until the training ends, `step` steps being done."""
        progress = self.progress(step)
        if progress >= 1:
            return 0.0
        step_s, surcharges_s = self.expect(progress)
        return (self.steps - step) * step_s + surcharges_s + self.pauses_s(self.steps)

    def measured(self, step: int, image_px: int, seconds: float, now_s: float) -> None:
        """Note what a step took; `step` steps are done now. Plans anew if the rest would not fit, or leave time."""
        if image_px in self.first_s:
            self.recent_s[image_px].append(seconds)
        else:
            self.first_s[image_px], self.recent_s[image_px] = seconds, deque(maxlen=9)
        if self.deadline_s is None:
            return
        progress = self.progress(step)
        if not self.knots:  # the very first step: assume it was as far as any other will be
            # It is the slowest of all; to take pauses off as well would plan for so few that the next comes too late.
            steps = max(2, round((self.deadline_s - now_s) / self.expect(0.0)[0]) + 1)
            self.knots.append(Knot(0, 0.0, steps))
            return
        if progress >= 1:
            return
        step_s, surcharges_s = self.expect(progress)
        left_s = self.deadline_s - now_s - surcharges_s
        unused_s = left_s - (self.steps - step) * step_s - self.pauses_s(self.steps)
        if unused_s < 0 or unused_s > max(self.SLACK * left_s, 1.5 * step_s):
            # As if pauses became fewer with the steps; as far as they do not, the next step finds out and plans again.
            share = left_s * (1 - self.HEADROOM) / (left_s - unused_s)
            self.knots.append(Knot(step, progress, step + max(1, int((self.steps - step) * share))))
