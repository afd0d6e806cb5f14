"""Accuracy against training for the recipes that the planner chooses from: measure, fit, write planner/curves.json.

    python bench/curves.py --out DIR --seeds 0 1

Each recipe of the ladder trains for each of its numbers of epochs, on all but 5,000 training images, and is judged on
those with test-time augmentation; a seed holds out 5,000 of its own. The test images are never looked at. A line of
DIR/runs.jsonl for each training; the same command again goes on from there. Then a curve is laid through the trainings
of a recipe, and DIR/curves.png shows both. Seconds do not matter here, so anything may run beside it.
"""

import argparse
import json
import math
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import numpy as np
from candidates import read_job, run_once
from scipy.optimize import least_squares

from fastcifar.benchmarks.loaders import versions
from fastcifar.job import HELD_OUT
from fastcifar.planner.choose import fit_batch_size
from fastcifar.planner.curve import Curve, read_curve
from fastcifar.process import set_threads, tune_allocator
from fastcifar.report import png
from fastcifar.run import source_commit, write_atomically

CLASSES = {"cifar10": 10, "cifar100": 100}
EPOCHS = {  # where a budget of up to some minutes puts it on two cores; what is longer is extrapolated
    "cifar10": {
        "speed-narrow": (0.25, 0.5, 1, 2, 4, 8, 16, 24),
        "speed": (0.5, 1, 2, 4, 8, 16, 48),
        "speed-wide": (2, 4, 8, 24),
        "speed-pair": (4, 8, 12),
    },
    "cifar100": {
        "speed-narrow": (0.5, 1, 2, 4, 8),
        "speed": (1, 2, 4, 8, 16),
        "speed-wide": (2, 4, 8),
    },
}
TARGET = Path(__file__).parents[1] / "fastcifar/planner/curves.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--datasets", nargs="+", default=list(CLASSES))
    chosen = parser.parse_args()
    tune_allocator()
    set_threads()
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "runs.jsonl"
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for key in trainings(chosen.datasets, chosen.seeds):
        if any(all(run[part] == value for part, value in key.items()) for run in runs):
            continue
        runs.append(key | train(**key) | {"versions": versions(), "commit": source_commit()})
        with file.open("a") as lines:
            lines.write(json.dumps(runs[-1]) + "\n")
        print({name: runs[-1][name] for name in (*key, "accuracy_tta", "train_s")}, flush=True)
    curves = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    for dataset in chosen.datasets:
        curves[dataset] = fit_all(runs, dataset)
    write_atomically(TARGET, (json.dumps(curves, indent=1) + "\n").encode())
    write_atomically(chosen.out / "curves.png", draw(curves))


def trainings(datasets: list[str], seeds: list[int]) -> list[dict]:
    """Seed by seed, so that an interrupted measurement has something of everything."""
    return [
        {"dataset": dataset, "recipe": name, "epochs": epochs, "seed": seed}
        for seed in seeds
        for dataset in datasets
        for name, lengths in EPOCHS[dataset].items()
        for epochs in lengths
    ]


def train(dataset: str, recipe: str, epochs: float, seed: int) -> dict:
    """One training with the batch size that the planner would take; accuracies are shares of 1."""
    job = read_job(f"--recipe {recipe} --dataset {dataset} --epochs {epochs}")
    settings = replace(job.settings, batch_size=fit_batch_size(job.settings, epochs * 50_000))
    return run_once(replace(job, settings=settings, seed=seed)) | {"batch_size": settings.batch_size}


def fit_all(runs: list[dict], dataset: str) -> dict:
    """The recipes' curves, and the trainings beneath them, as curves.json holds them.

    All have the same power and spread: a few trainings do not tell those of each, and beyond the longest of them it is
    the power that decides.
    """

    def key(run: dict) -> tuple[str, str]:
        return run["dataset"], run["recipe"]

    points = {
        name: sorted((run["epochs"], run["accuracy_tta"]) for run in runs if key(run) == (dataset, name))
        for name in EPOCHS[dataset]
    }
    start = 1 - 1 / CLASSES[dataset]
    images = HELD_OUT * len({run["seed"] for run in runs if run["dataset"] == dataset})  # a seed holds out its own

    def curves(p: np.ndarray) -> dict[str, Curve]:
        """From the logarithms of the power and of each recipe's floor and half."""
        power, *rest = (float(value) for value in np.exp(p))
        pairs = zip(rest[::2], rest[1::2], strict=True)
        return {
            name: Curve(start, *pair, power, spread=0.0, bends=((1.0, 1.0),), images=images)
            for name, pair in zip(points, pairs, strict=True)
        }

    def misses(p: np.ndarray) -> np.ndarray:
        found = curves(p)
        return np.array([math.log(found[n].error(e) / (1 - a)) for n, some in points.items() for e, a in some])

    lowest = {name: min(1 - accuracy for _, accuracy in some) for name, some in points.items()}
    begin = [0.8, *(value for name in points for value in (0.8 * lowest[name], 0.1))]

    def bent(name: str, curve: Curve) -> Curve:
        """Through the mean of the trainings of each length."""
        by_epochs = defaultdict(list)
        for epochs, accuracy in points[name]:
            by_epochs[epochs].append((1 - accuracy) / curve.unbent(epochs))
        return replace(curve, spread=spread, bends=tuple((epochs, mean(seen)) for epochs, seen in by_epochs.items()))

    best = least_squares(misses, np.log(begin), loss="soft_l1", f_scale=0.05)
    spread = math.sqrt((misses(best.x) ** 2).sum() / (len(misses(best.x)) - len(begin)))
    return {
        name: {"curve": asdict(bent(name, curve)), "epochs_and_accuracy": points[name]}
        for name, curve in curves(best.x).items()
    }


def draw(curves: dict) -> bytes:
    """Error rates on logarithmic axes, a panel for each data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(curves), 4.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(curves)))
    for panel, (dataset, entries) in zip(panels, curves.items(), strict=True):
        for name, found in entries.items():
            points = found["epochs_and_accuracy"]
            at = np.geomspace(points[0][0], points[-1][0] * 2)
            [line] = panel.plot(at, [100 * read_curve(found["curve"]).error(e) for e in at], label=name)
            panel.plot([e for e, _ in points], [100 * (1 - a) for _, a in points], ".", color=line.get_color())
        panel.set(xscale="log", yscale="log", xlabel="epochs", ylabel="wrong answers, %", title=dataset)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.legend()
        panel.grid(alpha=0.3, which="both")
    return png(figure)


if __name__ == "__main__":
    main()
