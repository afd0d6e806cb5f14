"""Complete trainings of recipes with seed after seed, on all GPUs at once, and what may be concluded from them.

Each is a `fastcifar train` of its own, one at a time on each GPU; without a GPU, one after the other. Round by round
every recipe trains with the round's seed. What is found finished in the folder is not repeated, what was interrupted
begins anew: a training that was halted is no evidence of how long one takes.
"""

import itertools
import json
import math
import os
import queue
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastcifar.devices import pick_device
from fastcifar.display import Display
from fastcifar.errors import UsageError, read_error
from fastcifar.recipes import find_named
from fastcifar.run import source_commit

FIGURES = ("test_acc_tta", "test_acc", "train_s", "wall_s", "device", "steps", "data_verified")


@dataclass(frozen=True)
class Plan:
    """Which trainings: of `recipes`, with seeds 0 to `seeds` - 1, in `folder`.

    Args:
        where: dataset (None is each recipe's own), data and device.
    """

    recipes: list[str]
    seeds: int
    where: dict
    folder: Path

    def flags(self, recipe: str, seed: int) -> list[str]:
        data = ["--data", str(self.where["data"])] if self.where["data"] else []
        flags = ["--recipe", recipe, "--seed", str(seed), "--dataset", own_dataset(recipe, self.where), *data]
        return [*flags, "--json", "--out", str(self.run_folder(recipe, seed))]

    def run_folder(self, recipe: str, seed: int) -> Path:
        return self.folder / f"{recipe}-{seed}"


def own_dataset(recipe: str, where: dict) -> str:
    return where["dataset"] or find_named(recipe).dataset


@dataclass(frozen=True)
class Training:
    """One that was made, or failed: then `result` is empty and `error` says why."""

    recipe: str
    seed: int
    result: dict
    error: str = ""


def train_all(plan: Plan, display: Display) -> list[Training]:
    """All of them, those that are there already included. Raises UsageError for a folder of another commit's."""
    keys = list(itertools.product(range(plan.seeds), plan.recipes))
    for seed, recipe in keys:
        refuse_other(plan, recipe, seed)
    workers: queue.SimpleQueue = queue.SimpleQueue()
    devices = list_devices(plan.where["device"])
    for worker in devices:
        workers.put(worker)

    def train(key: tuple[int, str]) -> Training:
        seed, recipe = key
        worker = workers.get()
        try:
            made = train_one(plan, recipe, seed, *worker)
            display.say(f"{recipe}, seed {seed}: {made.error or 'done'}")
            return made
        finally:
            workers.put(worker)

    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            return list(pool.map(train, keys))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Control-C has reached the trainings by itself
            raise


def list_devices(name: str) -> list[tuple[str, dict[str, str]]]:
    """(--device, environment) of each worker: every GPU that is visible, the one that was named, or the CPU."""
    device = pick_device(name)
    if device.type == "cpu" or device.index is not None:
        return [(str(device), {})]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return [("cuda", {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in visible.split(",")]


def train_one(plan: Plan, recipe: str, seed: int, device: str, environment: dict[str, str]) -> Training:
    folder = plan.run_folder(recipe, seed)
    if not (folder / "result.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "fastcifar", "train", *plan.flags(recipe, seed), "--device", device]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        if done.returncode:
            return Training(recipe, seed, {}, read_error(done.stderr)[0] or f"exit code {done.returncode}")
    return Training(recipe, seed, json.loads((folder / "result.json").read_text()))


def refuse_other(plan: Plan, recipe: str, seed: int) -> None:
    """Raise UsageError if the folder holds a training by other code or on other data: the two are not one sample."""
    file = plan.run_folder(recipe, seed) / "result.json"
    if not file.exists():
        return
    found, commit, dataset = json.loads(file.read_text()), source_commit(), own_dataset(recipe, plan.where)
    if (found["commit"], found["dataset"]) != (commit, dataset):
        raise UsageError(
            f"--out: {file} is of commit {found['commit']} on {found['dataset']}, this is {commit} on {dataset}.",
            "another --out FILE.json",
        )


# What they say


def summarise(trainings: list[Training], plan: Plan, target: float | None) -> dict:
    """For each recipe: n, mean and standard deviation of accuracy and seconds, and the p-value for the target."""
    rows = []
    for recipe in plan.recipes:
        runs = [training for training in trainings if training.recipe == recipe]
        made: list[dict] = [
            {"seed": run.seed} | {name: run.result[name] for name in FIGURES} for run in runs if run.result
        ]
        accuracies, train_s = ([run[name] for run in made] for name in ("test_acc_tta", "train_s"))
        rows.append(
            {
                "recipe": recipe,
                "n": len(made),
                "accuracy": spread(accuracies),
                "train_s": spread(train_s),
                "p": None if target is None else p_at_least(accuracies, target),
                "runs": made,
                "failed": {run.seed: run.error for run in runs if not run.result},
            }
        )
    return {"asked": plan.seeds, "target": target, "recipes": rows}


def spread(values: list[float]) -> dict[str, float | None]:
    return {
        "mean": statistics.mean(values) if values else None,
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def p_at_least(values: list[float], target: float) -> float | None:
    """One-sided p-value of Student's t-test: how likely a mean as high is if the true one were only `target`.

    None for fewer than two values, or without any spread.
    """
    n = len(values)
    if n < 2 or not statistics.stdev(values):
        return None
    t = (statistics.mean(values) - target) / (statistics.stdev(values) / math.sqrt(n))
    return t_tail(t, n - 1)


def t_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's distribution.

    With T = sqrt(freedom) * tan(a) the density of a is cos(a) ** (freedom - 1), over an interval that ends: Gauss's 200
    points are exact to rounding.
    """
    low, high = math.atan(t / math.sqrt(freedom)), math.pi / 2
    points, weights = np.polynomial.legendre.leggauss(200)
    angles = low + (high - low) * (points + 1) / 2
    area = float((weights * np.cos(angles) ** (freedom - 1)).sum()) * (high - low) / 2
    log_whole = math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2) + math.log(math.pi) / 2
    return area / math.exp(log_whole)


def table(summary: dict) -> Iterator[str]:
    """The summary as lines of Markdown."""
    target = summary["target"]
    goal = "p" if target is None else f"p (mean above {target:.2%})"
    yield f"\n| recipe | trainings | accuracy with TTA | training | {goal} |"
    yield "|---|---:|---:|---:|---:|"
    for row in summary["recipes"]:
        n = f"{row['n']}" + (f" of {summary['asked']}" if row["n"] < summary["asked"] else "")
        p = "" if row["p"] is None else f"{row['p']:.2g}"
        yield f"| {row['recipe']} | {n} | {percent(row['accuracy'])} | {seconds(row['train_s'])} | {p} |"
        for seed, error in row["failed"].items():
            yield f"| seed {seed} failed | | {error} | | |"


def percent(of: dict[str, float | None]) -> str:
    mean, deviation = of["mean"], of["standard_deviation"]
    return "not measured" if mean is None else f"{mean:.2%}" + ("" if deviation is None else f" ± {deviation:.2%}")


def seconds(of: dict[str, float | None]) -> str:
    mean, deviation = of["mean"], of["standard_deviation"]
    return (
        "not measured" if mean is None else f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}") + " s"
    )
