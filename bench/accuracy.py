"""What accuracy takes how long on this machine: this project, the published method, the reports' systems, in turn.

    python bench/accuracy.py --out DIR --seeds 5
    python bench/accuracy.py --out DIR --seeds 5 --only "60 s" speed94 airbench94

Round by round every way trains once with the round's seed, as a `fastcifar train` of its own; nothing else should run
beside it. Of each training a line goes to DIR/runs.jsonl as soon as it is done; the same command again goes on from
there, and more names or seeds add to it. Then DIR/table.md: mean accuracy on the test images, medians of the seconds,
the share of airbench94's seconds, and p, how likely so high a mean is if the true one were only the goal (Student's t).
DIR/accuracy.png: wrong answers against seconds.

By the seconds of earlier trainings a round of everything takes two hours on two cores with AMX, half of them for
dynamic4 and dynamic11: --only says what matters.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from fastcifar.benchmarks.seeds import p_at_least
from fastcifar.process import physical_cores, processor
from fastcifar.report import png
from fastcifar.run import source_commit, write_atomically

OURS, PUBLISHED, REPORTS = "this project", "the published method", "systems of the reports, the fast way"
MARKERS = {OURS: "o", PUBLISHED: "s", REPORTS: "^"}


@dataclass(frozen=True)
class Way:
    """One way to spend time: a name, flags of `fastcifar train`, whose it is, and the accuracy it is to reach."""

    name: str
    flags: str
    whose: str
    goal: float | None = None


WAYS = (
    Way("45 s", "--budget 45s", OURS),
    Way("60 s", "--budget 60s", OURS, 0.91),
    Way("4 min", "--budget 4min", OURS),
    Way("5 min", "--budget 5min", OURS, 0.95),
    Way("10 min", "--budget 10min", OURS),
    Way("15 min", "--budget 15min", OURS, 0.958),
    Way("speed94", "--recipe speed94", OURS, 0.94),
    Way("airbench94", "--recipe airbench94", PUBLISHED, 0.94),
    Way("mlp", "--recipe mlp", REPORTS),
    Way("cnn2", "--recipe cnn2", REPORTS),
    Way("cnn4", "--recipe cnn4", REPORTS),
    Way("dynamic11", "--recipe dynamic11", REPORTS),
    Way("dynamic4", "--recipe dynamic4", REPORTS),
    Way("CIFAR-100, 5 min", "--dataset cifar100 --budget 5min", OURS, 0.72),
)
KEPT = (
    *("recipe", "seed", "budget_s", "wall_s", "compile_s", "train_s", "eval_s", "epochs", "steps"),
    *("test_acc", "test_acc_tta", "expected_acc_tta", "dataset", "data_verified", "torch"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[way.name for way in WAYS])
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "runs.jsonl"
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    here = {"machine": f"{processor()}, {physical_cores()} cores", "instructions": os.environ.get("ONEDNN_MAX_CPU_ISA")}
    here |= {"commit": source_commit()}
    if any(run[name] != value for run in runs for name, value in here.items()):
        sys.exit(f"{file} holds trainings of another commit or machine than {here}: another --out.")
    for seed in range(chosen.seeds):
        for way in WAYS:
            done = any((run["name"], run["seed"]) == (way.name, seed) for run in runs)
            if done or way.name not in (chosen.only or way.name):
                continue
            runs.append({"name": way.name, "flags": way.flags} | here | train(way, seed))
            with file.open("a") as lines:
                lines.write(json.dumps(runs[-1]) + "\n")
            found = runs[-1]
            print(f"{way.name}, seed {seed}: {found['test_acc_tta']:.2%} in {found['wall_s']:.1f} s", flush=True)
    write_atomically(chosen.out / "table.md", table(runs).encode())
    write_atomically(chosen.out / "accuracy.png", draw(runs))
    print(table(runs))


def train(way: Way, seed: int) -> dict:
    """What one training's result.json says."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*shlex.split(way.flags), "--seed", str(seed), "--out", f"{folder}/run", "--json"]
        done = subprocess.run([sys.executable, "-m", "fastcifar", "train", *flags], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"fastcifar train {shlex.join(flags)}: exit code {done.returncode}")
        result = json.loads(done.stdout.splitlines()[-1])
    if not result["data_verified"]:
        sys.exit(f"{result['dataset']} is not the real data set here: set FASTCIFAR_DATA. try: fastcifar data verify")
    return {name: result.get(name) for name in KEPT}


def by_way(runs: list[dict]) -> Iterable[tuple[Way, list[dict]]]:
    for way in WAYS:
        if some := [run for run in runs if run["name"] == way.name]:
            yield way, some


def training_s(run: dict) -> float:
    """The clock of the speed records: training and evaluation, without imports, compiling and planning."""
    return run["train_s"] + run["eval_s"]


def table(runs: list[dict]) -> str:
    """A row for each way, in Markdown."""
    published = [training_s(run) for run in runs if run["name"] == "airbench94"]
    lines = [
        "| | trained | n | accuracy with TTA | goal | p | training and evaluation | of airbench94's | wall-clock |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for way, some in by_way(runs):
        accuracies = [run["test_acc_tta"] for run in some]
        spread = f" ± {stdev(accuracies):.2%}" if len(some) > 1 else ""
        p = p_at_least(accuracies, way.goal) if way.goal else None
        seconds = median(training_s(run) for run in some)
        trained = ", ".join(sorted({f"`{run['recipe']}`" for run in some}))
        cells = (
            *(way.name, f"{trained}, {mean(run['epochs'] for run in some):.1f} epochs", len(some)),
            *(f"{mean(accuracies):.2%}{spread}", f"{way.goal:.1%}" if way.goal else "", f"{p:.2g}" if p else ""),
            *(f"{seconds:.1f} s", f"{seconds / median(published):.2f}" if published else ""),
            f"{median(run['wall_s'] for run in some):.1f} s",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict]) -> bytes:
    """Wrong answers to CIFAR-10's test images against wall-clock seconds: means and medians, and a dot a training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for whose, marker in MARKERS.items():
        ways = [(way, some) for way, some in by_way(runs) if way.whose == whose and some[0]["dataset"] == "cifar10"]
        if not ways:
            continue
        at = {way: (median(run["wall_s"] for run in some), wrong(some)) for way, some in ways}
        [line] = axes.plot(*zip(*at.values(), strict=True), marker, label=whose)
        axes.plot(*zip(*sorted(at[way] for way in at if "--budget" in way.flags), strict=True), color=line.get_color())
        for way, some in ways:
            axes.plot([run["wall_s"] for run in some], [wrong([run]) for run in some], ".", color="black", markersize=2)
            beside = (6, 4) if "--budget" in way.flags else (6, -10)  # so that neighbours stay legible
            axes.annotate(way.name, at[way], beside, textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="wall-clock", ylabel="wrong answers to the test images, %")
    axes.set_title(f"CIFAR-10 on {runs[0]['machine']}")
    seconds, percents = (30, 60, 120, 300, 600, 1200, 2400), (4, 5, 6, 7, 8, 10, 15, 20, 30, 40)
    axes.set_xticks(seconds, [f"{s} s" if s < 60 else f"{s // 60} min" for s in seconds])
    axes.set_yticks(percents, list(map(str, percents)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)


def wrong(runs: list[dict]) -> float:
    """Percent of the test images, in the mean."""
    return 100 * (1 - mean(run["test_acc_tta"] for run in runs))


if __name__ == "__main__":
    main()
