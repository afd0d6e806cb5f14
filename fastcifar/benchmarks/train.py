"""`fastcifar bench train`: how fast this GPU trains each recipe, and how much of what it can do that is.

Steps of `train_step` (forward, backward, optimizers) on a batch made beforehand, the image sizes of a recipe in turn,
so that a slow moment hits all alike. A sample is a few steps between two times that the program waits for the device,
as it seldom does in a training; `bench loaders` says whether a loader keeps up. The schedule stands half-way through
the stage of each size.

The recipes follow one another, each with the compiler's memory wiped: networks of the same code share it, and at the
ninth version torch.compile trains eagerly.

Arithmetic is that of convolutions and matrix products, forward and backward, counted on the plain network: an operator
of ours, a recomputation or the optimizer adds nothing to it. Its yardstick is the fastest of a few matrix products,
right after the recipe's steps. With --seeds, complete trainings as well (`seeds.py`).
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastcifar.benchmarks.energy import ReadJoules, open_counter
from fastcifar.benchmarks.loaders import make_room, versions
from fastcifar.benchmarks.seeds import Plan, own_dataset, summarise, train_all
from fastcifar.benchmarks.seeds import table as seeds_table
from fastcifar.devices import out_of_memory_named, pick_device, synchronize
from fastcifar.display import Display
from fastcifar.errors import EXIT_DONE, DataError, UsageError, UserError
from fastcifar.graphs import Step
from fastcifar.job import Job
from fastcifar.models.build import build_model
from fastcifar.optim.schedule import set_learning_rates
from fastcifar.process import physical_cores, processor
from fastcifar.recipes import find_recipe
from fastcifar.resize import resize
from fastcifar.run import source_commit, write_json
from fastcifar.settings import Recipe
from fastcifar.setup import Setup, set_up
from fastcifar.train import ready_step, train_step

# From cheap to costly, one of each kind that a GPU may suit differently; the last ones on operators of our own.
RECIPES = ("speed-narrow", "speed", "speed-wide", "airbench94", "resnet34", "dynamic11", "dynamic4")
ROUNDS = {"cuda": 30, "cpu": 3}
STEPS = {"cuda": 10, "cpu": 1}  # of a sample
PEAK_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (1024, 2048)}
PEAK_ROUNDS = 5
ENERGY_S = 2.0  # of steps for each reading of a counter that moves every tenth of a second
COUNTED_IMAGES = 32
NOT_MEASURED = "not measured"


def run(recipes: list[str], seeds: int, target: float | None, where: dict, out: Path | None, display: Display) -> int:
    """Measure, print tables, write `out` (JSON); returns the exit code: 1 if a recipe, or a training, went wrong.

    Args:
        where: `dataset`, `data` and `device`, as Job has them; a dataset of None is each recipe's own, and CIFAR-10
            where no recipe is named.

    Raises DataError, DeviceError, UsageError.
    """
    if seeds < 0 or (seeds and out is None) or (target is not None and not seeds):
        problem = "must not be negative" if seeds < 0 else "a number of complete trainings, kept beside --out"
        raise UsageError(f"--seeds: {problem}.", "--seeds 20 --target 0.94 --out bench.json")
    if target is not None and not 0 < target < 1:
        raise UsageError(f"--target: is an accuracy between 0 and 1, not {target:g}.", "--target 0.94")
    if not recipes:
        where = where | {"dataset": where["dataset"] or "cifar10"}
    jobs = {
        name: Job(name, find_recipe(name), own_dataset(name, where), where["data"], device=where["device"], steps=1)
        for name in recipes or RECIPES
    }
    device = pick_device(where["device"])
    if out is not None:
        make_room(out)
    _, why_no_energy = open_counter(device)
    report = {**facts(device), "rows": [], "failed": {}, "no_energy": why_no_energy}
    for name, job in jobs.items():
        display.say(f"{name}: setting up")
        try:
            report["rows"] += measure(job, display)
        except DataError as error:
            if len({job.dataset for job in jobs.values()}) == 1:  # which no recipe can do without
                raise
            report["failed"][name] = describe(error)
        except Exception as error:  # a kernel or compiler may fail in any way, and the other recipes still be fine
            report["failed"][name] = describe(error)
        if out is not None:
            write_json(out, report)
    display.close()
    for line in table(report):
        print(line)
    failed = bool(report["failed"])
    if out is not None and seeds:
        plan = Plan(list(jobs), seeds, where, out.with_name(f"{out.stem}-runs"))
        report["seeds"] = summarise(train_all(plan, display), plan, target)
        for line in seeds_table(report["seeds"]):
            print(line)
        write_json(out, report)
        failed = failed or any(row["failed"] for row in report["seeds"]["recipes"])
    return 1 if failed else EXIT_DONE


def facts(device: torch.device) -> dict:
    """What the figures depend on beside the code."""
    return {
        "machine": f"{processor()}, {physical_cores()} cores",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
        "commit": source_commit(),
    }


def describe(error: Exception) -> str:
    """One line of an error."""
    if isinstance(error, UserError):
        return error.message
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


# Measuring


class Course:
    """The steps of one recipe at one image size, on one batch, as half-way through the stage of that size.

    Args:
        step: what `ready_step` made; the courses of a recipe may share it.
    """

    def __init__(self, setup: Setup, image_px: int, step: Step | None = None):
        self.setup, self.image_px = setup, image_px
        self.step = step or ready_step(setup, setup.recipe)
        self.x_BCHW, self.y_B = next(setup.loader.epoch(0))
        ends = {stage.image_px: stage.until for stage in setup.recipe.stages}
        begin = max((end for end in ends.values() if end < ends[image_px]), default=0.0)
        self.progress = (begin + ends[image_px]) / 2
        self.rates: list[float] = []

    def time_steps(self, steps: int) -> float:
        """Seconds that so many take. Raises ArithmeticError: the loss is no longer a number, so nothing is measured."""
        for optimizer in self.setup.optimizers:  # a course at a later stage may have frozen some
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.requires_grad_(True)
        set_learning_rates(self.setup.optimizers, self.progress, self.setup.recipe.optim)
        synchronize(self.setup.device)
        began_s = time.perf_counter()
        for _ in range(steps):
            loss, _ = self.step(self.x_BCHW, self.y_B, self.image_px)
        synchronize(self.setup.device)
        seconds = time.perf_counter() - began_s
        if not torch.isfinite(loss):
            raise ArithmeticError(f"recipe {self.setup.name}, {self.image_px} px: the loss became {loss.item()}")
        return seconds

    def sample(self) -> None:
        steps = STEPS[self.setup.device.type]
        self.rates.append(steps * len(self.y_B) / self.time_steps(steps))


def measure(job: Job, display: Display) -> list[dict]:
    """A row of figures for each image size of a recipe."""
    torch.compiler.reset()
    with out_of_memory_named(job.settings.batch_size):
        setup = set_up(job, display)
        step = ready_step(setup, setup.recipe)
        sizes = sorted({stage.image_px for stage in setup.recipe.stages})
        courses = [Course(setup, image_px, step) for image_px in sizes]
        memory_bytes = [peak_of_a_step(course) for course in courses]  # which also warms them up
        rounds = ROUNDS[setup.device.type]
        for round_, course in itertools.product(range(rounds), courses):
            display.work(f"{setup.name} at {course.image_px} px", round_, rounds)
            course.sample()
        peak = matrix_peak(setup.recipe.dtype, setup.device)
        read_joules, _ = open_counter(setup.device)
        joules = [None if read_joules is None else energy(course, read_joules) for course in courses]
    figures = zip(courses, memory_bytes, joules, strict=True)
    return [
        describe_course(course, peak) | {"peak_memory_bytes": bytes_, "joules_per_1000_images": joules_}
        for course, bytes_, joules_ in figures
    ]


def describe_course(course: Course, peak: float) -> dict:
    recipe = course.setup.recipe
    tenths = statistics.quantiles(course.rates, n=10, method="inclusive")
    images_per_s = statistics.median(course.rates)
    flop = count_flop(recipe, len(course.setup.dataset.class_names), course.image_px)
    return {
        "recipe": course.setup.name,
        "dataset": course.setup.dataset.name,
        "image_px": course.image_px,
        "batch_size": recipe.batch_size,
        "dtype": recipe.dtype,
        "images_per_s": images_per_s,
        "p20_images_per_s": tenths[1],
        "p80_images_per_s": tenths[7],
        "samples": len(course.rates),
        "steps_a_sample": STEPS[course.setup.device.type],
        "flop_per_image": flop,
        "tflop_per_s": flop * images_per_s / 1e12,
        "matrix_peak_tflop_per_s": peak,
        "share_of_matrix_peak": flop * images_per_s / 1e12 / peak,
    }


def peak_of_a_step(course: Course) -> int | None:
    """The most memory that tensors take during a step, images and optimizers' state included. None on a CPU.

    Of a step that is done, not replayed: a graph has asked for its memory when it was recorded.
    """
    course.time_steps(1)  # by which the optimizers have their state
    if course.setup.device.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats(course.setup.device)
    train_step(course.setup, course.setup.recipe, resize(course.x_BCHW, course.image_px), course.y_B)
    return torch.cuda.max_memory_allocated(course.setup.device)


def count_flop(recipe: Recipe, classes: int, image_px: int) -> float:
    """Of convolutions and matrix products for one image, forward and backward; a multiplication and an addition are 2.

    The network is counted in float32 on a device without contents, where convolutions are PyTorch's: those of our own
    are not known to the counter, and take fewer multiplications on some processors.
    """
    model = build_model(recipe.from_scratch(), classes, seed=0).to("meta").train()
    x_BCHW = torch.empty(COUNTED_IMAGES, 3, image_px, image_px, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x_BCHW.contiguous(memory_format=torch.channels_last)).sum().backward()
    return counter.get_total_flops() / COUNTED_IMAGES


def matrix_peak(dtype: str, device: torch.device) -> float:
    """TFLOP/s of the fastest of a few square matrix products."""
    best = 0.0
    for size in PEAK_SIZES[device.type]:
        a_NN, b_NN = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        for _ in range(1 + PEAK_ROUNDS):
            synchronize(device)
            began_s = time.perf_counter()
            for _ in range(STEPS[device.type]):
                torch.mm(a_NN, b_NN)
            synchronize(device)
            best = max(best, STEPS[device.type] * 2 * size**3 / (time.perf_counter() - began_s) / 1e12)
    return best


def energy(course: Course, read_joules: ReadJoules) -> float:
    """Joules of the whole board for a thousand images, over seconds of steps without a pause."""
    course.time_steps(STEPS[course.setup.device.type])
    began_s, began_j, images = time.perf_counter(), read_joules(), 0
    while time.perf_counter() - began_s < ENERGY_S:
        course.time_steps(STEPS[course.setup.device.type])
        images += STEPS[course.setup.device.type] * len(course.y_B)
    return (read_joules() - began_j) / images * 1000


# Reporting


def table(report: dict) -> Iterator[str]:
    """The report as lines of Markdown."""
    yield "| recipe | pixels | images/s | 20 to 80 of 100 samples | TFLOP/s | of matrix peak | memory | J/1000 images |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in report["rows"]:
        memory, joules = row["peak_memory_bytes"], row["joules_per_1000_images"]
        cells = (
            row["recipe"],
            str(row["image_px"]),
            f"{row['images_per_s']:,.0f}",
            f"{row['p20_images_per_s']:,.0f} to {row['p80_images_per_s']:,.0f}",
            f"{row['tflop_per_s']:.2f}",
            f"{row['share_of_matrix_peak']:.0%}",
            NOT_MEASURED if memory is None else f"{memory / 2**30:.2f} GiB",
            NOT_MEASURED if joules is None else f"{joules:.2f}",
        )
        yield "| " + " | ".join(cells) + " |"
    for name, why in report["failed"].items():
        yield f"| {name} | | {NOT_MEASURED}: {why} | | | | | |"
    peak = max((row["matrix_peak_tflop_per_s"] for row in report["rows"]), default=None)
    yield f"\n{report['device']}, matrix peak: {NOT_MEASURED if peak is None else f'{peak:.2f} TFLOP/s'}."
    if report["no_energy"]:
        yield f"Energy: {NOT_MEASURED}, {report['no_energy']}."
