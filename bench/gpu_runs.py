"""Recipes trained again and again on one device, in turn, on all training images: accuracy and seconds of each.

    python bench/gpu_runs.py --out runs.jsonl --runs 20 --recipes speed airbench94

In one process, as the scripts of speed records do it, so that compiling is paid once: round by round every recipe
trains with the round's seed, weights, order and augmentation anew. A first round trains without being counted. A line
of the file for each training as soon as it is done; the same command again goes on from there. `train_s` is that of
result.json, `eval_s` the evaluation with test-time augmentation. The clocks of cifar10-airbench and its descendants
count both, and the fit of the whitening layer, which here is part of the setting up.
"""

import argparse
import json
import math
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", type=float, help="instead of each recipe's own")
    chosen = parser.parse_args()
    tune_allocator()
    set_threads()
    # A model that no longer compiles would be trained eagerly from then on, without a word.
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # type: ignore[attr-defined]
    found = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    done = [row for row in found if "not_measured" not in row]
    write_atomically(chosen.out, "".join(json.dumps(row) + "\n" for row in done).encode())
    dropped: set[str] = set()
    with chosen.out.open("a", buffering=1) as lines:
        for seed in range(WARM_UP, chosen.runs):
            for name in chosen.recipes:
                if name in dropped or any((row["recipe"], row["seed"]) == (name, seed) for row in done):
                    continue
                try:
                    row = train_once(name, chosen.data, chosen.device, max(0, seed), chosen.epochs)
                except Exception as error:  # the other recipes may still be fine
                    dropped.add(name)
                    row = {"not_measured": describe(error)}
                if seed != WARM_UP or name in dropped:
                    lines.write(json.dumps({"recipe": name, "seed": seed} | row) + "\n")
    raise SystemExit(bool(dropped))


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
