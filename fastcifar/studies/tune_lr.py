"""The learning-rate range test of Smith (2015, arXiv:1506.01186).

A fresh model is trained on batch after batch while all of its learning rates, each multiplied by the same factor, rise
exponentially from far too low to too high. The suggestion is a third of the rate at which the smoothed loss is lowest:
beyond that one it gets worse, and a schedule that stays near its peak wants some distance to it.

The test ends where the smoothed loss is above the one it began with. It would not do to wait for an explosion: Adam
and BatchNorm hold the loss down, and at absurd rates it comes back to that of a model that finds all classes equally
likely, which may be the lowest there is.
"""

import itertools
import math
from collections.abc import Iterator

import torch

from fastcifar.display import Display
from fastcifar.errors import DivergedError
from fastcifar.job import Job
from fastcifar.resize import resize
from fastcifar.settings import Optim, SpeedOptim
from fastcifar.setup import Setup
from fastcifar.train import train_step

STEPS = 120
LOWEST, HIGHEST = 1e-3, 1e3  # factors; 20 steps for each factor of ten
SMOOTH = 5  # steps on either side that a smoothed loss is the mean of
BEGINNING = 2 * SMOOTH + 1  # steps whose mean is the loss it began with
WORSE = 1.05  # times that, where the test ends; batches of 32 images differ by 1.6 % once smoothed
BELOW = 1 / 3  # of the rate with the lowest loss is suggested


def measure(job: Job, setup: Setup, display: Display) -> dict:
    """The loss at each factor until it is too high, and the suggestion. Deterministic on a CPU for a seed.

    Raises DivergedError if even the lowest rates are too high.
    """
    torch.manual_seed(job.seed)
    factors, losses = [], []
    for step, (factor, loss) in enumerate(rise(setup)):
        display.work("learning rate", step, STEPS)
        if not math.isfinite(loss):
            break
        factors.append(factor)
        losses.append(loss)
        # The newest smoothed losses wait for neighbours yet.
        if len(losses) > BEGINNING and smooth(losses)[-1 - SMOOTH] > WORSE * sum(losses[:BEGINNING]) / BEGINNING:
            break
    if len(losses) <= BEGINNING:
        name, peak = next(iter(peaks(setup.recipe.optim).items()))
        raise DivergedError(
            f"The loss explodes at a thousandth of --{name} {peak:g} already.",
            write_rates(setup.recipe.optim, LOWEST / 100),
        )
    smoothed = smooth(losses)
    lowest = smoothed.index(min(smoothed))
    suggested = BELOW * factors[lowest]
    return {
        "batch_size": setup.recipe.batch_size,
        "image_px": setup.recipe.stages[0].image_px,
        "seed": job.seed,
        "device": str(setup.device),
        "peaks": peaks(setup.recipe.optim),
        "factors": factors,
        "losses": losses,
        "smoothed": smoothed,
        "lowest_factor": factors[lowest],
        "suggested_factor": suggested,
        "still_falling": lowest == len(factors) - 1,
        "flags": write_rates(setup.recipe.optim, suggested),
    }


def rise(setup: Setup) -> Iterator[tuple[float, float]]:
    """(factor, loss of an image before the step with it), on images of the size that the recipe begins with."""
    batches = itertools.chain.from_iterable(setup.loader.epoch(epoch) for epoch in itertools.count())
    groups = [group for optimizer in setup.optimizers for group in optimizer.param_groups]
    decays = [group.get("weight_decay", 0.0) for group in groups]
    image_px = setup.recipe.stages[0].image_px
    for step, (x_BCHW, y_B) in zip(range(STEPS), batches, strict=False):
        factor = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        for group, decay in zip(groups, decays, strict=True):
            group["lr"] = factor * group["lr_peak"]
            if isinstance(setup.recipe.optim, SpeedOptim) and decay:
                group["weight_decay"] = decay / factor  # as `build_optimizers` would: it divides by the rate
        loss, _ = train_step(setup, setup.recipe, resize(x_BCHW, image_px), y_B)
        yield factor, loss.item() / len(y_B)


def smooth(losses: list[float]) -> list[float]:
    """Each loss and its neighbours, as many on either side, in the mean."""
    means = []
    for place in range(len(losses)):
        near = losses[max(0, place - SMOOTH) : place + SMOOTH + 1]
        means.append(sum(near) / len(near))
    return means


def peaks(optim: Optim) -> dict[str, float]:
    """The recipe's learning rates by field."""
    names = ("muon_lr", "bias_lr", "head_lr") if isinstance(optim, SpeedOptim) else ("lr",)
    return {f"optim.{name}": getattr(optim, name) for name in names}


def write_rates(optim: Optim, factor: float) -> str:
    """The recipe's learning rates times `factor`, as typed, two digits each."""
    return " ".join(f"--{name} {factor * peak:.2g}" for name, peak in peaks(optim).items())


def lines(report: dict) -> Iterator[str]:
    """What is printed."""
    name, peak = next(iter(report["peaks"].items()))
    lowest = report["lowest_factor"]
    steps = f"{len(report['factors'])} steps of {report['batch_size']} images"
    yield f"{steps}: the loss is lowest, {min(report['smoothed']):.3f}, at {name} {lowest * peak:.2g}"
    if report["still_falling"]:
        yield "It was still falling at the end: a higher rate may do as well."
    yield f"A third of that is {report['suggested_factor']:.2g} times what the recipe has:\n"
    yield f"    {report['flags']}"


def draw(report: dict) -> bytes:
    """Loss against learning rate, the suggestion marked, as PNG."""
    from matplotlib.figure import Figure

    from fastcifar.report import ACCENT, INK, SECOND, png

    name, peak = next(iter(report["peaks"].items()))
    rates = [factor * peak for factor in report["factors"]]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, report["losses"], color=ACCENT, alpha=0.35, linewidth=1, label="loss of a batch")
    axes.plot(rates, report["smoothed"], color=ACCENT, linewidth=1.8, label="smoothed")
    for factor, colour, line, what in (
        (report["suggested_factor"], SECOND, "-", "suggested"),
        (1.0, INK, "--", "the recipe's"),
    ):
        axes.axvline(factor * peak, color=colour, linestyle=line, linewidth=1.2, label=f"{what}: {factor * peak:.2g}")
    low, high = min(report["smoothed"]), report["smoothed"][0]
    axes.set_ylim(low - 0.2 * high, 1.3 * high)
    axes.set_xscale("log")
    axes.set_xlabel(name + (", the others in proportion" if len(report["peaks"]) > 1 else ""))
    axes.set_ylabel("training loss")
    title = f"recipe {report['recipe']}, {report['dataset']}, batches of {report['batch_size']}, seed {report['seed']}"
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    return png(figure)
