"""What a person watches while a training runs, on stderr: a live bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastcifar.planner.choose import Choice

TIMES = (("compiling", "compile_s"), ("training", "train_s"), ("evaluation", "eval_s"))


class Display:
    """`say` prints a line that stays; `update` moves the bar or, without a terminal, prints a line now and then."""

    LINE_EVERY_S = 10.0

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self.bar: Progress | None = None
        self.task = None
        self.printed_s = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def work(self, what: str, done: int, total: int) -> None:
        """Progress of anything but training, such as reading a data set: `done` of `total`."""
        self._move(done / max(1, total), what, "")

    def update(self, row: dict, steps: int, eta_s: float) -> None:
        """A training step: one row of metrics, the number of steps planned, the seconds left until it ends."""
        facts = (
            f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}  {row['images_per_s']:,.0f} images/s  "
            f"{row['image_px']} px  step {row['step']}/{steps}"
        )
        self._move(row["progress"], "training", f"{facts}  ETA {format_s(eta_s)}")

    def _move(self, share: float, what: str, facts: str) -> None:
        if self.console.is_terminal:
            if self.bar is None:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.percentage:3.0f}% {task.fields[facts]}"),
                )
                self.bar = Progress(*columns, console=self.console, transient=True)
                self.task = self.bar.add_task(what, total=1.0, facts=facts)
                self.bar.start()
            assert self.task is not None
            self.bar.update(self.task, completed=share, description=what, facts=facts)
        elif time.monotonic() - self.printed_s >= self.LINE_EVERY_S:
            self.printed_s = time.monotonic()
            self.say(f"{share:4.0%}  {what}  {facts}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def format_s(seconds: float) -> str:
    """Seconds as a person says them: 9 s, 4 min 05 s, 1 h 02 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


# What a finished command prints, on stdout


def print_table(rows: Iterable[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    Console(highlight=False).print(table)


def print_columns(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table with headings: words to the left, the figures beside them to the right."""
    table = Table(box=None, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=place > 0)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)  # a file has no edge


def print_result(result: dict, folder: Path) -> None:
    """What a person wants to know of a finished run."""
    data = result["dataset"] + (", every image verified" if result["data_verified"] else ", not official CIFAR")
    if result["fallback_from"]:
        data = f"{result['dataset']}, because {result['fallback_from']} was not there (--fallback-dataset)"
    within = f" of {format_s(result['budget_s'])}" if result["budget_s"] else ""
    times = ", ".join(f"{what} {result[key]:.1f} s" for what, key in TIMES)
    held_out = [("held out", f"{result['val_acc']:.2%}")] if result["val_acc"] is not None else []
    print_table(
        [
            ("test accuracy", f"{result['test_acc_tta']:.2%} with augmentation, {result['test_acc']:.2%} at one look"),
            *held_out,
            ("data", data),
            ("time", f"{format_s(result['wall_s'])}{within}: {times}"),
            (
                "trained",
                f"{result['steps']} steps, {result['epochs']:.2f} epochs, {result['images_per_s']:,.0f} images/s",
            ),
            ("report", str(folder / "report.html")),
        ]
    )


def print_plan(choices: Sequence["Choice"], command: str) -> None:
    """`fastcifar plan`: what the first one, the best, is made of and the command that does it, then all of them."""
    best = choices[0]
    recipe, model = best.recipe, best.recipe.model
    stages = ", ".join(f"{stage.image_px} pixels until {stage.until:.0%}" for stage in recipe.stages)
    rows = [
        ("recipe", f"{best.name}, {recipe.dtype}: " + ", ".join(f"{k} {v}" for k, v in asdict(model).items())),
        ("training", f"{best.epochs:.2f} epochs, {best.steps} steps of {recipe.batch_size} in {best.train_s:.0f} s"),
        ("images", stages),
        ("second look", f"at {recipe.tta.share:.0%} of the test images"),
    ]
    if best.expected:
        rows.append(("accuracy", f"{best.expected}, with the second look"))
    print_table([*rows, ("to do it", command), ("", "")])
    first_px, *more_px = sorted(best.rates.image_s)
    print_columns(
        ("measured", f"images/s, {first_px} px", *(f"{px} px" for px in more_px), "epochs", "accuracy, 95 of 100"),
        [
            (
                choice.name,
                *(
                    f"{choice.recipe.batch_size / choice.rates.of_step(px, choice.recipe.batch_size):,.0f}"
                    for px in (first_px, *more_px)
                ),
                f"{choice.epochs:.2f}",
                str(choice.expected or "not measured"),
            )
            for choice in choices
        ],
    )


def print_evaluation(result: dict) -> None:
    """`fastcifar eval`: the accuracies, each class, the top confusions."""
    classes = Table(box=None, pad_edge=False)
    for heading in ("class", "precision", "recall", "F1"):
        classes.add_column(heading, justify="left" if heading == "class" else "right")
    for name, scores in result["classes"].items():
        classes.add_row(name, *(f"{scores[key]:.3f}" for key in ("precision", "recall", "f1")))
    classes.add_row("macro", *(f"{result[f'macro_{key}']:.3f}" for key in ("precision", "recall", "f1")), style="bold")
    Console(highlight=False).print(classes)
    print_table(
        [
            ("", ""),
            ("test accuracy", f"{result['test_acc_tta']:.2%} with augmentation, {result['test_acc']:.2%} at one look"),
            ("confusions", ", ".join(f"{true} for {taken} ({n})" for true, taken, n in result["top_confusions"])),
        ]
    )
