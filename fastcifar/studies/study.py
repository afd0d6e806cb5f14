"""What the studies share: a folder of trainings, the loop that trains them, and what is read from their run folders."""

import json
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcifar.display import Display, format_s
from fastcifar.errors import DivergedError, UsageError, UserError
from fastcifar.process import physical_cores, processor
from fastcifar.run import make_folder, write_json
from fastcifar.studies.flags import refuse_flags
from fastcifar.studies.trial import run_trial

MARK = "study.json"
FIGURES = ("val_acc", "best_val_acc", "test_acc", "test_acc_tta", "train_s", "wall_s")


@dataclass(frozen=True)
class Training:
    """One training of a study: its name, the flags of `train`, its run folder."""

    name: str
    words: list[str]
    folder: Path


# Before the first training


def check_study(verb: str, seeds: int, flags: list[str], *more: str) -> None:
    """Raise UsageError for a flag that a study with several seeds sets itself, `more` included, or for no seeds."""
    refuse_flags(verb, flags, "--seed", "--json", *more)
    if seeds < 1:
        raise UsageError(f"--seeds: must be at least 1, is {seeds}.", "--seeds 3")


def open_study(folder: Path, command: list[str]) -> None:
    """Make the folder of a study, or go on in that of the same command. Raises UsageError if it holds anything else."""
    if not (folder / MARK).is_file() and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"--out: {folder} holds something that is no study.", "another --out DIR")
    make_folder(folder)
    mark_folder(folder, {"words": command})


def mark_folder(folder: Path, whose: dict) -> None:
    """Note whose trainings lie in the folder.

    Raises UsageError if they are another study's: they would be taken for this one's, as what is found finished is not
    repeated.
    """
    if not (folder / MARK).is_file():
        write_json(folder / MARK, whose)
        return
    found = json.loads((folder / MARK).read_text())
    if found != whose:
        again = shlex.join(["fastcifar", *found["words"], "--out", str(folder)]) + ", or " if "words" in found else ""
        raise UsageError(f"--out: {folder} holds the trainings of another study.", f"{again}another --out DIR")


# The trainings


def train_each(trainings: list[Training], display: Display, again: str) -> Iterator[dict]:
    """Train one after the other; yields the outcome of each (`read_outcome`). Finished ones are only read.

    A training that diverges is an outcome too; any other mistake ends the study, and its message names the training.

    Args:
        again: the command that goes on with the study, for whoever stops it.

    Raises what `run_trial` does, but for DivergedError.
    """
    took_s = []
    for done, training in enumerate(trainings):
        left = f"; {format_s(statistics.mean(took_s) * (len(trainings) - done))} left" if took_s else ""
        if not is_finished(training.folder):
            display.say(f"{training.name}: {done} of {len(trainings)} trainings done{left}")
            try:
                run_trial(training.words, training.folder)
            except DivergedError as error:
                # Without its checkpoint, or the study would go on with what is no number any more.
                (training.folder / "checkpoint.safetensors").unlink(missing_ok=True)
                write_json(training.folder / "diverged.json", {"diverged": error.message})
            except UserError as error:
                error.message = f"{training.name}: {error.message}"
                raise
            except KeyboardInterrupt:
                display.say(f"Stopped. Go on with: {again}")
                raise
        outcome = read_outcome(training.folder)
        took_s += [outcome["wall_s"]] if "wall_s" in outcome else []
        yield outcome


def is_finished(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("result.json", "diverged.json"))


def read_outcome(folder: Path) -> dict:
    """What a finished run folder says: result.json and `best_val_acc`, or only {"diverged": why}.

    `best_val_acc` is the best look at the held-out images while training, `val_acc` the last one.
    """
    if (folder / "diverged.json").is_file():
        return json.loads((folder / "diverged.json").read_text())
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    best = max(row["val_accuracy"] for row in rows if "val_accuracy" in row)
    return json.loads((folder / "result.json").read_text()) | {"best_val_acc": best}


# Figures over the seeds


def over_seeds(outcomes: dict[int, dict]) -> dict:
    """Outcomes by seed: the figures of each, and the `mean` and `spread` (sample standard deviation) over the seeds.

    Those that diverged are left out: `spread` is None of only one, and both are empty without any.
    """
    finished = [outcome for outcome in outcomes.values() if "diverged" not in outcome]
    columns = {figure: [outcome[figure] for outcome in finished] for figure in FIGURES if finished}
    kept = ("diverged", *FIGURES)
    return {
        "seeds": [{name: run[name] for name in kept if name in run} | {"seed": seed} for seed, run in outcomes.items()],
        "mean": {figure: statistics.mean(values) for figure, values in columns.items()},
        "spread": {figure: statistics.stdev(values) if len(values) > 1 else None for figure, values in columns.items()},
    }


def percent(summary: dict, figure: str) -> str:
    """The mean of some accuracies (`over_seeds`), with their spread if there is one: 93.78, or 93.78 ± 0.12."""
    mean, deviation = summary["mean"][figure], summary["spread"][figure]
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def sources(outcomes: Sequence[dict]) -> dict[str, str | None]:
    """Where the outcomes come from; several of a kind, if the study was gone on with elsewhere. The machine is this."""
    keys = ("dataset", "device", "torch", "commit")
    found = {key: sorted({str(outcome[key]) for outcome in outcomes if outcome.get(key)}) for key in keys}
    cores = physical_cores()
    machine = f"{processor()}, {cores} {'core' if cores == 1 else 'cores'}"
    return {key: ", ".join(values) or None for key, values in found.items()} | {"machine": machine}


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: words to the left, the figures beside them to the right."""
    rule = "|---|" + "---:|" * (len(headings) - 1)
    return "\n".join([line(headings), rule, *map(line, rows)])


def line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
