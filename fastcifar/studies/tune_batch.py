"""How many images a step: images a second and peak memory while the batch doubles.

It ends before the memory does, as foretold by the last two batches; or with the data set; or where two doublings in a
row have gained next to nothing.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import psutil
import torch
from torch import nn

from fastcifar.devices import out_of_memory_named, synchronize
from fastcifar.display import Display
from fastcifar.errors import DeviceError
from fastcifar.job import Job
from fastcifar.resize import resize
from fastcifar.setup import Setup
from fastcifar.train import train_step

WARM_UP, STEPS = 2, 5
LEAST_S = 0.3  # of steps, however short they are
GAIN = 1.05  # less than this over the best so far is no gain, and within it a batch is as fast as the best
PATIENCE = 2  # doublings without one
MARGIN = 0.9  # of the memory that is free may be used


@dataclass(frozen=True)
class Measured:
    """One batch size."""

    batch_size: int
    images_per_s: float
    memory_bytes: int  # of the GPU by tensors, or of the machine by this process


def measure(job: Job, setup: Setup, display: Display) -> dict:
    """Every batch size until one of the three ends, and the suggestions."""
    images, batch_size, rows = len(setup.loader.labels_N), setup.recipe.batch_size, []
    while True:
        display.work(f"batches of {batch_size}", batch_size, images)
        try:
            with out_of_memory_named(batch_size):
                rows.append(time_batch(setup, batch_size))
        except DeviceError:
            if not rows:
                raise
            end = f"batches of {batch_size} did not fit into memory"
            break
        batch_size *= 2
        if batch_size > images:
            end = f"{setup.dataset.name} has {images} training images"
            break
        if stagnates(rows):
            end = f"the last {PATIENCE} doublings gained less than {GAIN - 1:.0%}"
            break
        if foretell(rows) > MARGIN * free_bytes(setup.device):
            end = f"batches of {batch_size} would not fit into memory"
            break
    best = max(row.images_per_s for row in rows)
    return {
        "device": torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else "cpu",
        "image_px": largest_px(setup),
        "dtype": setup.recipe.dtype,
        "batches": [vars(row) for row in rows],
        "end": end,
        "suggested": next(row.batch_size for row in rows if GAIN * row.images_per_s >= best),
        "largest": rows[-1].batch_size,
    }


def time_batch(setup: Setup, batch_size: int) -> Measured:
    """Train on one batch a few times over."""
    setup.loader.batch_size = batch_size
    if setup.forward is not setup.model:  # compiled anew for every size, as a training would
        torch.compiler.reset()
        setup = replace(setup, forward=cast(nn.Module, torch.compile(setup.model)))
    x_BCHW, y_B = next(iter(setup.loader.epoch(0)))
    x_BCHW, times_s = resize(x_BCHW, largest_px(setup)), []
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setup.device)
    while len(times_s) < WARM_UP + STEPS or sum(times_s) < LEAST_S:
        synchronize(setup.device)
        began_s = time.perf_counter()
        train_step(setup, setup.recipe, x_BCHW, y_B)
        synchronize(setup.device)
        times_s.append(time.perf_counter() - began_s)
    return Measured(batch_size, batch_size / statistics.median(times_s[WARM_UP:]), used_bytes(setup.device))


def largest_px(setup: Setup) -> int:
    """The size of image, in pixels, that takes the most memory."""
    return max(stage.image_px for stage in setup.recipe.stages)


def used_bytes(device: torch.device) -> int:
    """At the peak of this batch size. On a CPU this process gives nothing back, so what it has now is that."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def free_bytes(device: torch.device) -> int:
    """What this process could still get, of the GPU or the machine, in all that it may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + used_bytes(device)


def foretell(rows: list[Measured]) -> float:
    """Bytes that twice the last batch will need: the second half of it took as much as each of the next two will."""
    if len(rows) < 2:
        return 0.0
    return rows[-1].memory_bytes + 2 * max(0, rows[-1].memory_bytes - rows[-2].memory_bytes)


def stagnates(rows: list[Measured]) -> bool:
    """Whether none of the last few was faster than the best before them by a real gain."""
    rates = [row.images_per_s for row in rows]
    return len(rates) > PATIENCE and max(rates[-PATIENCE:]) < GAIN * max(rates[:-PATIENCE])


def lines(report: dict) -> Iterator[str]:
    """What is printed."""
    yield "| batch | images/s | memory |"
    yield "|---:|---:|---:|"
    for row in report["batches"]:
        yield f"| {row['batch_size']} | {row['images_per_s']:,.0f} | {row['memory_bytes'] / 2**30:.2f} GiB |"
    yield f"\nIt ended there because {report['end']}."
    yield f"The smallest batch within {GAIN - 1:.0%} of the fastest: --batch_size {report['suggested']}"
    yield f"The largest that was seen to fit: --batch_size {report['largest']}"


def draw(report: dict) -> bytes:
    """Images a second and memory against the batch, as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from fastcifar.report import ACCENT, INK, SECOND, png

    sizes = [row["batch_size"] for row in report["batches"]]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rate, memory = figure.subplots(1, 2)
    rate.plot(sizes, [row["images_per_s"] for row in report["batches"]], "o-", color=ACCENT)
    rate.axvline(report["suggested"], color=SECOND, linewidth=1.2, label=f"suggested: {report['suggested']}")
    rate.legend(frameon=False, loc="lower right")
    rate.set_title("images a second", loc="left")
    memory.plot(sizes, [row["memory_bytes"] / 2**30 for row in report["batches"]], "o-", color=INK)
    memory.set_title("peak memory, GiB", loc="left")
    for axes in (rate, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.set_xlabel(f"batch; recipe {report['recipe']}, {report['image_px']} px, {report['device']}")
    return png(figure)
