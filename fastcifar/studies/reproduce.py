"""`fastcifar reproduce`: the recipes of the reports, trained as reported and the fast way, beside what was reported.

The folder is a record, small enough for a repository: of each run config.yaml, result.json and, of metrics.jsonl, the
rows with a look at the held-out images. The weights are deleted as soon as a run is finished.
"""

import argparse
import json
import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fastcifar.display import Display, format_s, print_columns
from fastcifar.errors import EXIT_DONE, UsageError
from fastcifar.job import Job
from fastcifar.recipes import NAMED, Claim, find_named
from fastcifar.run import pick_folder, write_atomically, write_json
from fastcifar.studies.flags import Flags, read_train
from fastcifar.studies.study import (
    Training,
    check_study,
    markdown,
    open_study,
    over_seeds,
    percent,
    sources,
    train_each,
)

WAYS = ("as-reported", "fast")
MARKERS = "<!-- reproduce -->", "<!-- /reproduce -->"
HEADINGS = ("recipe", "reported: validation / test", "as reported: the same", "", "fast: test / with TTA", "")
MISSING = "not measured"
WHERE = ("--data", "--dataset", "--device", "--loader", "--workers")  # flags that leave a recipe what it is


@dataclass(frozen=True)
class Reproduction:
    """What was asked for: the arguments of `fastcifar reproduce`.

    Args:
        recipes: their names; none is all that come from a report.
        only: one of the two ways, or None for both.
        seeds: how many each is trained with.
        flags: of `train`, for all trainings.
    """

    recipes: list[str]
    only: str | None
    seeds: int
    flags: list[str]

    def command(self) -> list[str]:
        only = ["--only", self.only] if self.only else []
        return ["reproduce", *self.recipes, *only, "--seeds", str(self.seeds), *self.flags]

    def names(self) -> list[str]:
        """In the order of recipes.py, cheap ones first."""
        return [name for name, named in NAMED.items() if named.reported and (not self.recipes or name in self.recipes)]

    def ways(self) -> tuple[str, ...]:
        return (self.only,) if self.only else WAYS


def flags() -> Flags:
    parser = Flags(
        "reproduce",
        "[RECIPE ...]",
        "Train the recipes that come from a report (default: all), as reported and the fast way. 5,000 training images "
        "are held out. The same command with the same --out goes on where it was stopped.",
        "[--only WAY] [--seeds N] [--out DIR] [--readme FILE]",
    )
    parser.add_argument("--only", choices=WAYS, default=None, help="one of the two ways")
    parser.add_argument(
        "--readme", metavar="FILE", type=Path, default=None, help="replace the table between the markers in this file"
    )
    parser.add_seeds()
    parser.add_out("bench/records/DATE-reproduce-DEVICE in a checkout, else a new one in runs/")
    return parser


def run(words: list[str]) -> int:
    """Make the study that these words ask for; returns the exit code. Raises what `reproduce` raises."""
    names, own, rest = flags().split(words)
    reproduce(Reproduction(names, own.only, own.seeds, rest), own.out, own.readme, Display())
    return EXIT_DONE


def reproduce(asked: Reproduction, out: Path | None, readme: Path | None, display: Display) -> dict:
    """Train what is not trained yet; write reproduce.json and table.md after each training, at last to `readme`.

    Nothing is trained before all flags were found to be right. Returns what reproduce.json holds.

    Raises UsageError, and what a training raises; one that diverges is a cell of the table.
    """
    jobs = check(asked)
    if readme is not None:
        between_markers(readme)
    path = out or default_folder(next(iter(jobs.values())))
    open_study(path, asked.command())
    trainings = plan_trainings(asked, path)
    again = shlex.join(
        ["fastcifar", *asked.command(), "--out", str(path), *(["--readme", str(readme)] if readme else [])]
    )
    display.say(f"The record: {path}")
    outcomes, report = {}, {}
    for training, outcome in zip(trainings, train_each(trainings, display, again), strict=True):
        outcomes[training.folder] = outcome
        slim(training.folder)
        report = describe(asked, jobs, path, outcomes)
        write_json(path / "reproduce.json", report)
        write_atomically(path / "table.md", table_file(asked, report).encode())
    rows = tabulate(report)
    if readme is not None:
        write_table(readme, rows)
    print_columns(HEADINGS, map(fill, rows))
    return report


# Before the first training


def check(asked: Reproduction) -> dict[tuple[str, str], Job]:
    """{(recipe, way): its job}. Raises UsageError for the first value that makes no sense."""
    check_study("reproduce", asked.seeds, asked.flags, "--as_reported")
    for name in asked.recipes:
        if find_named(name).reported is None:
            raise UsageError(f"reproduce: recipe {name} comes from no report.", "fastcifar reproduce mlp")
    ways = [(name, way) for name in asked.names() for way in asked.ways()]
    return {(name, way): read_train(words(asked, name, way), "reproduce")[0] for name, way in ways}


def words(asked: Reproduction, name: str, way: str) -> list[str]:
    """The flags of `train`."""
    return ["--recipe", name, *(["--as_reported"] if way == "as-reported" else []), *asked.flags, "--validate"]


def default_folder(job: Job) -> Path:
    """A record of this checkout, or without one a folder in runs/."""
    import torch

    from fastcifar.devices import pick_device

    records = Path(__file__).parents[2] / "bench" / "records"
    if not records.is_dir():
        return pick_folder("reproduce")
    device = pick_device(job.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return records / f"{datetime.now():%Y-%m-%d}-reproduce-{'-'.join(name.lower().split())}"


def plan_trainings(asked: Reproduction, path: Path) -> list[Training]:
    return [
        Training(
            f"{name} {way}, seed {seed}",
            [*words(asked, name, way), "--seed", str(seed)],
            run_folder(path, name, way, seed),
        )
        for name in asked.names()
        for way in asked.ways()
        for seed in range(asked.seeds)
    ]


def run_folder(path: Path, name: str, way: str, seed: int) -> Path:
    return path / name / way / f"seed{seed}"


def slim(folder: Path) -> None:
    """Leave of a finished run what a record needs. May be repeated."""
    for name in ("model.safetensors", "report.html"):
        (folder / name).unlink(missing_ok=True)
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        rows = metrics.read_text().splitlines(keepends=True)
        write_atomically(metrics, "".join(row for row in rows if "val_accuracy" in json.loads(row)).encode())


# What came out


def describe(asked: Reproduction, jobs: dict[tuple[str, str], Job], path: Path, outcomes: dict[Path, dict]) -> dict:
    """reproduce.json, of the trainings done so far: accuracies are shares of 1, `mean` and `spread` over the seeds."""
    recipes = []
    for name in asked.names():
        entry: dict = {"recipe": name, "label": label(asked, jobs[name, asked.ways()[0]])}
        for way in asked.ways():
            folders = [run_folder(path, name, way, seed) for seed in range(asked.seeds)]
            runs = {seed: outcomes[folder] for seed, folder in enumerate(folders) if folder in outcomes}
            entry[way] = over_seeds(runs)
        recipes.append(entry)
    return {
        "flags": asked.flags,
        **sources(list(outcomes.values())),
        "recipes": recipes,
    }


def label(asked: Reproduction, job: Job) -> str:
    """The recipe in a table: with its data set, and with the flags that make it another one."""
    titles = {"cifar10": [], "cifar100": ["CIFAR-100"]}
    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in WHERE:
        where.add_argument(flag)
    changed = shlex.join(where.parse_known_args(asked.flags)[1])
    return ", ".join([f"`{job.recipe}`", *titles.get(job.dataset, [job.dataset]), *([changed] if changed else [])])


def tabulate(report: dict) -> list[list[str]]:
    """A row for each recipe; the two cells of a way that was not trained are empty, so that older ones may stay."""
    rows = []
    for entry in report["recipes"]:
        as_reported = cells(entry.get("as-reported"), "best_val_acc", "test_acc")
        fast = cells(entry.get("fast"), "test_acc", "test_acc_tta")
        rows.append([entry["label"], write_claim(NAMED[entry["recipe"]].claim), *as_reported, *fast])
    return rows


def cells(way: dict | None, *keys: str) -> list[str]:
    """Two accuracies in percent, and the wall-clock of one run."""
    if not way or not way["seeds"]:
        return ["", ""]
    lost = sum("diverged" in run for run in way["seeds"])
    if not way["mean"]:
        return ["diverged", ""]
    pair = " / ".join(percent(way, key) for key in keys)
    return [
        f"{pair} %" + (f" ({lost} of {len(way['seeds'])} diverged)" if lost else ""),
        format_s(way["mean"]["wall_s"]),
    ]


def write_claim(claim: Claim) -> str:
    """Validation, the best epoch if it is given, and test at the end: the figures that a run is judged by, too."""
    val = claim.val if claim.val_best is None else claim.val_best
    if val is None and claim.test is None:
        return "not given"
    digits = 0 if claim.about else 2
    pair = " / ".join("–" if share is None else f"{100 * share:.{digits}f}" for share in (val, claim.test))
    return ("about " if claim.about else "") + f"{pair} %"


def table_file(asked: Reproduction, report: dict) -> str:
    """table.md: the table, and how it was made."""
    rows = [fill(row) for row in tabulate(report)]
    command = shlex.join(["fastcifar", *asked.command()])
    made = f"`{command}`; {report['machine']}, {report['device']}, torch {report['torch']}; seconds are wall-clock."
    return f"{markdown(HEADINGS, rows)}\n\n{made}\n"


def fill(row: list[str]) -> list[str]:
    """Say of a way that was not trained that it was not."""
    return [*row[:2], row[2] or MISSING, row[3], row[4] or MISSING, row[5]]


# The README


def write_table(readme: Path, rows: list[list[str]]) -> None:
    """Put these rows into the table between the markers. What was not trained now stays there as it was.

    Raises UsageError if the markers are not there.
    """
    before, between, after = between_markers(readme)
    lines = [line for line in between.splitlines() if line.startswith("| `")]
    old = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    table = {row[0]: row for row in old}  # by recipe and flags, so that other flags are another row
    for row in rows:
        kept = table.get(row[0], [])
        kept += [""] * (len(HEADINGS) - len(kept))
        ways = (row[2:4] if row[2] else kept[2:4]) + (row[4:6] if row[4] else kept[4:6])
        table[row[0]] = fill([*row[:2], *ways])
    content = f"{before}{MARKERS[0]}\n{markdown(HEADINGS, list(table.values()))}\n{MARKERS[1]}{after}"
    write_atomically(readme, content.encode())


def between_markers(readme: Path) -> tuple[str, str, str]:
    """(text before the markers, between, after). Raises UsageError if one is not there."""
    try:
        before, first, rest = readme.read_text().partition(MARKERS[0])
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--readme: cannot read {readme}: {error}.", "--readme README.md") from error
    between, second, after = rest.partition(MARKERS[1])
    if not first or not second:
        raise UsageError(f"--readme: {readme} has no lines {' and '.join(MARKERS)}.", "--readme README.md")
    return before, between, after
