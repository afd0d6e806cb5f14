"""Is a change to a recipe worth it? Candidates beside the recipe as it is, in turn, on held-out training images.

    python bench/candidates.py --out DIR --seeds 3 --flags "--epochs 8" lr="--optim.muon_lr 0.3" more="--epochs 9"

Each candidate is a name and flags of `fastcifar train`, added to --flags; "as-it-is" has none. Round by round every one
of them trains once with the round's seed, in this process, on all but 5,000 training images, and is judged on those,
with and without test-time augmentation: the test images are never looked at. Of each training a line goes to
DIR/runs.jsonl as soon as it is done; the same command again goes on from there. DIR/table.md compares the means with
those of as-it-is: p is Welch's, for there being no difference.
"""

import argparse
import json
import math
import shlex
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy.stats import ttest_ind

from fastcifar.benchmarks.loaders import versions
from fastcifar.budget import Knot, Pace
from fastcifar.display import Display
from fastcifar.evaluate import evaluate
from fastcifar.job import Job
from fastcifar.looks import Looks
from fastcifar.process import physical_cores, processor, set_threads, tune_allocator
from fastcifar.run import source_commit, write_atomically
from fastcifar.setup import set_up
from fastcifar.studies.flags import read_train
from fastcifar.train import Position, fit

AS_IT_IS = "as-it-is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flags", default="", help="of `fastcifar train`, for all")
    parser.add_argument("candidates", nargs="*", metavar="NAME=FLAGS")
    chosen = parser.parse_args()
    given = dict(candidate.split("=", 1) for candidate in chosen.candidates)
    jobs = {name: read_job(f"{chosen.flags} {flags}") for name, flags in {AS_IT_IS: "", **given}.items()}
    tune_allocator()
    set_threads()
    chosen.out.mkdir(parents=True, exist_ok=True)
    lines = chosen.out / "runs.jsonl"
    runs = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    about = {"machine": f"{processor()}, {physical_cores()} cores", "versions": versions(), "commit": source_commit()}
    for seed in range(chosen.seeds):
        for name, job in jobs.items():
            # By what it trains, so that a name may be given another meaning.
            key = {"name": name, "seed": seed, "settings": json.loads(json.dumps(asdict(job)))}
            if any(all(run[part] == value for part, value in key.items()) for run in runs):
                continue
            runs.append(key | run_once(replace(job, seed=seed)) | about)
            with lines.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            print(
                json.dumps({n: runs[-1][n] for n in ("name", "seed", "accuracy_tta", "accuracy", "train_s")}),
                flush=True,
            )
    wanted = [run for run in runs if run["name"] in jobs and run["seed"] < chosen.seeds]
    wanted = [run for run in wanted if run["settings"] == json.loads(json.dumps(asdict(jobs[run["name"]])))]
    table = compare(wanted)
    write_atomically(chosen.out / "table.md", table.encode())
    print(table)


def read_job(flags: str) -> Job:
    return replace(read_train(shlex.split(flags), "candidates")[0], validate=True)


def run_once(job: Job) -> dict:
    """One training; accuracies on the held-out images, as shares of 1."""
    torch.manual_seed(job.seed)
    torch.compiler.reset()  # candidates are networks of one code, of which torch.compile makes eight versions at most
    setup = set_up(job, Display())
    assert setup.held_out_loader is not None
    steps = job.steps or math.ceil(setup.recipe.epochs * len(setup.loader))
    pace, position = Pace(setup.recipe.stages, [Knot(0, 0.0, steps)]), Position()
    began_s = time.process_time()
    for _ in fit(setup, setup.recipe, pace, position, Looks(None, len(setup.loader))):
        pass
    cpu_s, began_s = time.process_time() - began_s, time.monotonic()
    seen = evaluate(setup.model, setup.held_out_loader, len(setup.dataset.class_names), setup.recipe.tta)
    return {
        "accuracy_tta": seen.accuracy_tta,
        "accuracy": seen.accuracy,
        "steps": steps,
        "train_s": position.train_s,
        "train_cpu_s": cpu_s,
        "eval_s": time.monotonic() - began_s,
    }


def compare(runs: list[dict]) -> str:
    """A row for each candidate: accuracy with augmentation, mean and spread, gain, p; and seconds of training."""
    table = ["| | seeds | accuracy | without TTA | gain | p | training | share |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
    of = {name: [run for run in runs if run["name"] == name] for name in dict.fromkeys(run["name"] for run in runs)}
    base = [run["accuracy_tta"] for run in of[AS_IT_IS]]
    base_s = mean(run["train_s"] for run in of[AS_IT_IS])
    for name, some in of.items():
        accuracies = [run["accuracy_tta"] for run in some]
        enough = len(accuracies) > 1 and len(base) > 1
        spread = f" ± {stdev(accuracies):.2%}" if enough else ""
        p = f"{ttest_ind(accuracies, base, equal_var=False)[1]:.3f}" if enough and name != AS_IT_IS else ""
        seconds = mean(run["train_s"] for run in some)
        cells = name, len(some), f"{mean(accuracies):.2%}{spread}", f"{mean(run['accuracy'] for run in some):.2%}"
        cells += f"{mean(accuracies) - mean(base):+.2%}", p, f"{seconds:.1f} s", f"{seconds / base_s:.2f}"
        table.append("| " + " | ".join(map(str, cells)) + " |")
    commits = ", ".join(dict.fromkeys(str(run["commit"]) for run in runs))
    return "\n".join([*table, "", f"Measured at commit {commits}.", ""])


if __name__ == "__main__":
    main()
