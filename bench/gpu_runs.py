"""Recipes trained again and again on one device, in turn, on all training images: accuracy and seconds of each.

    python bench/gpu_runs.py --out runs.jsonl --runs 20 --recipes speed airbench94

Each recipe has a process of its own, as the scripts of speed records have, so that it is compiled once and alone; they
take turns: round by round every recipe trains with the round's seed, weights, order and augmentation anew. A first
round trains without being counted. A line of the file for each training as soon as it is done; the same command again
goes on from there. `train_s` is that of result.json, `eval_s` the evaluation with test-time augmentation. The clocks of
cifar10-airbench and its descendants count both, and the fit of the whitening layer, which here is part of setting up.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from fastcifar.benchmarks.train import describe
from fastcifar.budget import Knot, Pace
from fastcifar.display import Display
from fastcifar.evaluate import evaluate
from fastcifar.job import Job
from fastcifar.looks import Looks
from fastcifar.process import set_threads, tune_allocator
from fastcifar.recipes import NAMED
from fastcifar.run import write_atomically
from fastcifar.setup import set_up
from fastcifar.train import Position, fit

WARM_UP = -1  # the round that is not counted
MARK = "figures: "  # before a worker's answer: compilers may print, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", type=float, help="instead of each recipe's own")
    parser.add_argument("--worker", action="store_true", help="train the one recipe for each seed on stdin")
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen)
        return
    found = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    done = [row for row in found if "not_measured" not in row]
    write_atomically(chosen.out, "".join(json.dumps(row) + "\n" for row in done).encode())
    names: list[str] = chosen.recipes
    workers = {name: hire(name) for name in names}
    dropped: set[str] = set()
    with chosen.out.open("a", buffering=1) as lines:
        for seed, name in [(seed, name) for seed in range(WARM_UP, chosen.runs) for name in names]:
            if name in dropped or any((row["recipe"], row["seed"]) == (name, seed) for row in done):
                continue
            row = {"recipe": name, "seed": seed} | order(workers[name], seed)
            if "not_measured" in row:  # the other recipes may still be fine
                dropped.add(name)
            if seed != WARM_UP or name in dropped:
                lines.write(json.dumps(row) + "\n")
    for worker in workers.values():
        worker.communicate()  # which closes its stdin, so that it ends
    raise SystemExit(bool(dropped))


def hire(recipe: str) -> subprocess.Popen:
    """A process that trains one recipe, with this one's other arguments."""
    command = [sys.executable, *sys.argv, "--worker", "--recipes", recipe]  # the last --recipes counts
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def order(worker: subprocess.Popen, seed: int) -> dict:
    """Have it train with this seed; its figures, or why there are none."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with suppress(BrokenPipeError):
        worker.stdin.write(f"{seed}\n")
        for line in worker.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
    return {"not_measured": f"its process ended with exit code {worker.wait()}"}


def work(chosen: argparse.Namespace) -> None:
    """Train for each seed that is asked for on stdin."""
    tune_allocator()
    set_threads()
    for line in sys.stdin:
        try:
            row = train_once(chosen.recipes[0], chosen.data, chosen.device, max(0, int(line)), chosen.epochs)
        except Exception as error:
            row = {"not_measured": describe(error)}
        print(MARK + json.dumps(row), flush=True)


def train_once(name: str, data: Path | None, device: str, seed: int, epochs: float | None) -> dict:
    """One training with everything new but what was compiled; accuracies are shares of 1."""
    named = NAMED[name]
    job = Job(name, named.recipe, dataset=named.dataset, data=data, device=device, seed=seed)
    if epochs is not None:
        job = replace(job, settings=replace(named.recipe, epochs=epochs))
    torch.manual_seed(seed)
    setup = set_up(job, Display())
    steps = math.ceil(setup.recipe.epochs * len(setup.loader))
    pace, position = Pace(setup.recipe.stages, [Knot(0, 0.0, steps)]), Position()
    for _ in fit(setup, setup.recipe, pace, position, Looks(None, len(setup.loader))):
        pass
    began_s = time.monotonic()
    seen = evaluate(setup.model, setup.test_loader, len(setup.dataset.class_names), setup.recipe.tta)
    return {
        "dataset": setup.dataset.name,
        "data_verified": setup.dataset.verified,
        "accuracy_tta": seen.accuracy_tta,
        "accuracy": seen.accuracy,
        "train_s": position.train_s,
        "eval_s": time.monotonic() - began_s,
        "steps": steps,
        "set_up_s": setup.compile_s,
    }


if __name__ == "__main__":
    main()
