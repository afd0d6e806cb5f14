"""`fastcifar bench loaders`: images a second of every loader that works here, beside what a training step takes.

Full epochs over the training images, with the augmentation, batch size and dtype of recipe `speed`, after one to warm
up; in turn, so that a slow moment of the machine hits all alike. A loader is timed only if it gives the batches of the
resident one. Two yardsticks from the same run: the steps of the recipe at each of its image sizes, on a batch made
beforehand, and a plain copy of finished batches, which no loader that writes them can outrun.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from fastcifar.devices import synchronize
from fastcifar.display import Display
from fastcifar.errors import UsageError, UserError
from fastcifar.job import Job
from fastcifar.loaders.feed import LOADERS, open_feed
from fastcifar.loaders.loader import Loader
from fastcifar.process import physical_cores, processor
from fastcifar.recipes import find_recipe
from fastcifar.report import png
from fastcifar.result import installed
from fastcifar.run import source_commit, write_atomically
from fastcifar.setup import Setup, set_up
from fastcifar.train import ready_step

RECIPE = "speed"
ROUNDS, STEPS, COPIES = 5, 8, 50
STEPS_TOGETHER = {"cuda": 10, "cpu": 1}  # between two times that the program waits for the device
LIBRARIES = ("torch", "torchvision", "ffcv", "nvidia-dali-cuda130", "numba", "numpy")


def run(job: Job, out: Path | None, display: Display) -> int:
    """Measure, print a table, write `out` (JSON) and a chart beside it. Raises DataError, DeviceError, UsageError."""
    if out is not None:
        make_room(out)
    setup = set_up(job, display)
    loaders, missing = open_loaders(setup, job, display)
    rates = measure(loaders, display)
    display.close()
    report = {
        "machine": f"{processor()}, {physical_cores()} cores",
        "device": torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else "cpu",
        "versions": versions(),
        "commit": source_commit(),
        "dataset": setup.dataset.name,
        "batch_size": setup.recipe.batch_size,
        "dtype": setup.recipe.dtype,
        "augment": asdict(setup.recipe.augment),
        "loaders": [
            {"loader": name, "workers": workers, "images_per_s": statistics.median(seen), "epochs": seen}
            for (name, workers), seen in rates.items()
        ],
        "not_here": missing,
        "step_images_per_s": step_rates(setup),
        "copy_images_per_s": copy_rate(setup),
    }
    for line in table(report):
        print(line)
    if out is not None:
        write_atomically(out, json.dumps(report, indent=2).encode())
        write_atomically(out.with_suffix(".png"), draw_chart(report))
    return 0


def make_room(out: Path) -> None:
    """Raise UsageError now, not after a minute of measuring, if `out` cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"--out: cannot write {out}: {error.strerror}.", "--out loaders.json") from error


def job(dataset: str, data: Path | None, device: str) -> Job:
    """What the loaders are to feed."""
    return Job(RECIPE, find_recipe(RECIPE), dataset=dataset, data=data, device=device, steps=1)


def versions() -> dict[str, str | None]:
    return {library: installed(library) for library in LIBRARIES}


def open_loaders(setup: Setup, job: Job, display: Display) -> tuple[dict[tuple[str, int], Loader], dict[str, str]]:
    """({(loader, workers): it, checked against the resident one}, {loader that is not installed: why})."""
    loaders, missing = {}, {}
    options = {"batch_size": setup.recipe.batch_size, "shuffle": True, "augment": setup.recipe.augment}
    counts = worker_counts()
    if setup.device.type == "cuda":  # where time is dear, and each loader takes six epochs
        counts = sorted({counts[0], counts[-1]})
    for name, workers in itertools.product(LOADERS, counts):
        if name == "resident" and setup.device.type == "cuda" and workers > 1:
            continue  # its workers are the GPU's
        try:
            where = {"data": job.data, "progress": display.work, "device": setup.device, "dtype": setup.loader.dtype}
            feed = open_feed(name, setup.dataset, workers=workers, **where)
        except UserError as error:
            missing[name] = error.message
            continue
        loader = loaders[name, workers] = feed.loader("train", **options)
        refuse_wrong(name, loader, setup.loader)
    return loaders, missing


def worker_counts() -> list[int]:
    """1, 2, 4 ... up to the number of cores."""
    cores = physical_cores()
    return sorted({*(2**power for power in range(cores.bit_length())), cores})


def refuse_wrong(name: str, loader: Loader, resident: Loader) -> None:
    """Raise ArithmeticError unless the first batch is the resident one, up to a rounding of its dtype."""
    (x_BCHW, y_B), (expected_BCHW, expected_B) = next(loader.epoch(0)), next(resident.epoch(0))
    near = torch.allclose(x_BCHW.float(), expected_BCHW.float(), rtol=torch.finfo(loader.dtype).eps, atol=2e-6)
    if not near or not torch.equal(y_B, expected_B):
        raise ArithmeticError(f"loader {name} gives other batches than the resident one: nothing was timed")


def measure(loaders: dict[tuple[str, int], Loader], display: Display) -> dict[tuple[str, int], list[float]]:
    """Images a second of each loader, an epoch each round."""
    rates = {key: [] for key in loaders}
    for done, (epoch, (key, loader)) in enumerate(itertools.product(range(ROUNDS + 1), loaders.items())):
        display.work(f"loader {key[0]}, workers {key[1]}", done, (ROUNDS + 1) * len(loaders))
        synchronize(loader.device)
        began_s = time.perf_counter()
        images = sum(len(y_B) for _, y_B in loader.epoch(epoch))
        synchronize(loader.device)
        if epoch:
            rates[key].append(images / (time.perf_counter() - began_s))
    return rates


def step_rates(setup: Setup) -> dict[int, float]:
    """Images a second through the step that trains, at each image size."""
    x_BCHW, y_B = next(setup.loader.epoch(0))
    step, rates = ready_step(setup, setup.recipe), {}
    together = STEPS_TOGETHER[setup.device.type]
    for image_px in [stage.image_px for stage in setup.recipe.stages]:
        times_s = []
        for _ in range(STEPS):
            synchronize(setup.device)
            began_s = time.perf_counter()
            for _ in range(together):
                step(x_BCHW, y_B, image_px)
            synchronize(setup.device)
            times_s.append((time.perf_counter() - began_s) / together)
        rates[image_px] = len(y_B) / statistics.median(times_s)
    return rates


def copy_rate(setup: Setup) -> float:
    """Images a second if a finished batch is merely copied, on the device."""
    x_BCHW, y_B = next(setup.loader.epoch(0))
    x_copy_BCHW, times_s = torch.empty_like(x_BCHW), []
    for _ in range(COPIES):
        synchronize(setup.device)
        began_s = time.perf_counter()
        x_copy_BCHW.copy_(x_BCHW)
        synchronize(setup.device)
        times_s.append(time.perf_counter() - began_s)
    return len(y_B) / statistics.median(times_s)


def table(report: dict) -> Iterator[str]:
    """The report as lines of Markdown."""
    step = max(report["step_images_per_s"].values())
    yield "| loader | workers | images/s | slowest and fastest epoch | times what a step takes |"
    yield "|---|---:|---:|---:|---:|"
    for row in report["loaders"]:
        low, high = min(row["epochs"]), max(row["epochs"])
        rate, workers = row["images_per_s"], row["workers"]
        yield f"| {row['loader']} | {workers} | {rate:,.0f} | {low:,.0f} to {high:,.0f} | {rate / step:.1f} |"
    for name, why in report["not_here"].items():
        yield f"| {name} | | not measured: {why} | | |"
    steps = ", ".join(f"{rate:,.0f} at {px} px" for px, rate in report["step_images_per_s"].items())
    yield f"\nA step of recipe {RECIPE} takes {steps}."
    yield f"A plain copy of finished batches makes {report['copy_images_per_s']:,.0f}."


def draw_chart(report: dict) -> bytes:
    """A bar for each loader and number of workers, on a logarithmic scale, as PNG."""

    from matplotlib.figure import Figure

    rows = report["loaders"]
    names = [f"{row['loader']}, {row['workers']} worker{'s' * (row['workers'] > 1)}" for row in rows]
    rates = [row["images_per_s"] for row in rows]
    colours = dict(zip(LOADERS, ("#0b6bcb", "#c2410c", "#4d7c0f", "#6b7280"), strict=True))
    step, copy = max(report["step_images_per_s"].values()), report["copy_images_per_s"]
    figure = Figure(figsize=(9, 1.6 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, rates, color=[colours[row["loader"]] for row in rows], height=0.7)
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=4, fontsize=9)
    for value, what in ((step, "training step"), (copy, "copy of batches")):
        axes.axvline(value, color="#24292f", linewidth=1, linestyle="--")
        axes.annotate(
            f"{what} {value:,.0f}", (value, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", va="bottom", fontsize=9,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(step / 2, copy * 4)
    axes.invert_yaxis()
    axes.set_xlabel(f"images a second, {report['dataset']}, batches of {report['batch_size']}, {report['machine']}")
    return png(figure)
