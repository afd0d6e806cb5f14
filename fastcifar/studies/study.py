"""What the studies share: a folder of trainings, the loop that trains them, and what is read from their run folders."""

import json
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcifar.display import Display, format_s
from fastcifar.errors import DivergedError, UsageError, UserError
from fastcifar.job import Job
from fastcifar.parsers import parse, read_job
from fastcifar.run import write_atomically
from fastcifar.studies.trial import run_trial

SET_BY_THE_STUDY = ("--recipe", "--config", "--seed", "--resume", "--plan", "--target", "--json")
FIGURES = ("val_acc", "best_val_acc", "test_acc", "test_acc_tta", "train_s", "wall_s")


@dataclass(frozen=True)
class Training:
    """One training of a study: its name, the flags of `train`, its run folder."""

    name: str
    words: list[str]
    folder: Path


# Before the first training


def refuse_flags(verb: str, flags: list[str]) -> None:
    """Raise UsageError for a flag of `train` that the study sets itself, or that would end a training early."""
    for word in flags:
        if (flag := word.partition("=")[0]) in SET_BY_THE_STUDY:
            raise UsageError(f"{flag}: cannot be given to `fastcifar {verb}`.", f"fastcifar {verb} --help")


def refuse_seeds(seeds: int) -> None:
    if seeds < 1:
        raise UsageError(f"--seeds: must be at least 1, is {seeds}.", "--seeds 3")


def job_of(words: list[str]) -> Job:
    """The job that these flags of `train` describe. Raises UsageError, as `train` does."""
    return read_job(parse(["train", *words])["train"])


def open_study(folder: Path, command: list[str]) -> None:
    """Make the folder of a study, or go on in that of the same command. Raises UsageError if it holds anything else."""
    told = folder / "study.json"
    if told.is_file():
        words = json.loads(told.read_text())["words"]
        if words != command:
            same = shlex.join(["fastcifar", *words, "--out", str(folder)])
            raise UsageError(f"--out: {folder} holds the study of another command.", f"{same}, or another --out")
        return
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"--out: {folder} holds something that is no study.", "another --out DIR")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot make the folder {folder}: {error.strerror}.", "another --out DIR") from error
    write_json(told, {"words": command})


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


def over_seeds(outcomes: Sequence[dict]) -> dict[str, list]:
    """{figure: [mean, sample standard deviation]} of the outcomes that did not diverge.

    The deviation is None of one outcome; without any, the dictionary is empty.
    """
    finished = [outcome for outcome in outcomes if "diverged" not in outcome]
    columns = {figure: [outcome[figure] for outcome in finished] for figure in FIGURES if finished}
    return {
        figure: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
        for figure, values in columns.items()
    }


def percent(figure: Sequence) -> str:
    """The mean of some accuracies, with their deviation if there is one: 93.78, or 93.78 ± 0.12."""
    mean, deviation = figure
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def sources(outcomes: Sequence[dict]) -> dict[str, str | None]:
    """Data set, device, torch and commit of the outcomes; several, if the study was gone on with elsewhere."""
    keys = ("dataset", "device", "torch", "commit")
    found = {key: sorted({str(outcome[key]) for outcome in outcomes if outcome.get(key)}) for key in keys}
    return {key: ", ".join(values) or None for key, values in found.items()}


# Files


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: words to the left, the figures beside them to the right."""
    rule = "|---|" + "---:|" * (len(headings) - 1)
    return "\n".join([line(headings), rule, *map(line, rows)])


def line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
