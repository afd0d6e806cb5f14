"""`fastcifar sweep`: which values of a recipe's fields train best.

Every setting is trained in a process of its own and judged by its accuracy on 5,000 training images that are held out;
the test images have no say in it. The same command, started once more here or elsewhere with the same --study and
--storage, is another worker of the same study, and goes on with it if the first was stopped (`queue.py`).
"""

import itertools
import json
import math
import re
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastcifar.display import Display, format_s, print_table
from fastcifar.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_USAGE, DeviceError, DivergedError, UsageError, UserError
from fastcifar.job import Job
from fastcifar.parsers import RECIPE_FIELDS
from fastcifar.run import make_folder, source_commit, write_atomically, write_json
from fastcifar.studies.fields import write_flags
from fastcifar.studies.flags import Flags, read_train, refuse_flags
from fastcifar.studies.search import LOG_FROM, Searched, read_search
from fastcifar.studies.study import mark_folder, markdown
from fastcifar.studies.trial import run_trial

if TYPE_CHECKING:  # Optuna need not be there for --help
    from fastcifar.studies.queue import Queue, Task

TRIALS = 20
# What may differ between two workers of one study: it changes where and how fast they train, not what.
LOCAL = ("data", "device", "workers", "loader", "track")
COLUMNS = 3  # of panels in the picture


def flags() -> Flags:
    parser = Flags(
        "sweep",
        "RECIPE",
        "Search the values of a recipe's fields that train best, judged on 5,000 held-out training images. Run the "
        "same command again, also at the same time or on another machine, and it works on the same study.",
        "--search FIELD=VALUES ... [--method grid|random|tpe] [--trials N] [--study NAME] [--storage URL] [--out DIR]",
    )
    parser.add_argument(
        "--search",
        nargs="+",
        action="extend",
        required=True,
        metavar="FIELD=VALUES",
        help="optim.lr=0.01,0.1 are choices; optim.lr=1e-4..1e-1 is a range, on a logarithmic scale if its ends are "
        f"positive and differ by a factor of {LOG_FROM:g} or more; whole numbers for a field of them",
    )
    parser.add_argument(
        "--method",
        choices=("grid", "random", "tpe"),
        default="grid",
        help="grid: every combination of the choices; random: drawn evenly; tpe: drawn near what was best so far, with "
        "Optuna's tree-structured Parzen estimator (default: grid)",
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help=f"random, tpe: how many trainings, by all workers together; more of them go on with a study "
        f"(default: {TRIALS})",
    )
    parser.add_argument("--study", metavar="NAME", help="its name in the storage (default: sweep-RECIPE)")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="postgresql://USER:PASSWORD@HOST/DATABASE for workers on several machines (or without the password, and "
        "$PGPASSWORD); default: a SQLite file in DIR",
    )
    parser.add_out("runs/NAME")
    return parser


def run(words: list[str]) -> int:
    """Work on the study until every point is complete; returns the exit code.

    Raises what `run_trial` raises, but for a training that fails by itself (`train_point`): it counts, with an accuracy
    of 0. If all of them failed, raises UserError.
    """
    [recipe], own, rest = flags().split(words)
    refuse_flags("sweep", rest)
    words = ["--recipe", recipe, *rest]
    job, chosen = read_train(words, "sweep")
    searched = read_search(own.search, recipe, job.settings)
    grid = read_points(own.method, searched, own.trials)
    check_samples(words, searched, grid)
    name = own.study or f"sweep-{recipe}"
    out = own.out or Path("runs") / name

    from fastcifar.cli import prepare_process
    from fastcifar.studies.queue import Queue

    prepare_process()
    from fastcifar.devices import pick_device

    pick_device(job.device)  # one that is not there would fail every training
    make_folder(out)
    queue = Queue(
        own.storage or f"sqlite:///{out / 'study.db'}",
        name,
        describe(job, own.method, searched),
        searched,
        points=len(grid) if grid else own.trials or TRIALS,
        grid=grid,
        method=own.method,
        seed=job.seed,
    )
    mark_folder(out, {"sweep": queue.identity})
    work(queue, words, out)
    report = write_report(queue, name, words, searched, own.method, out)
    failed = report["best"]["failed"] is not None
    if not failed:
        print_report(report, out)
    if chosen.json:
        print(json.dumps(report))
    if failed:
        raise name_failure(report, out)
    return EXIT_DONE


def read_points(method: str, searched: list[Searched], trials: int | None) -> list[dict[str, str]] | None:
    """The points of a grid; None if they are yet to be drawn. Raises UsageError."""
    if trials is not None and trials < 1:
        raise UsageError(f"--trials: must be at least 1, is {trials}.", f"--trials {TRIALS}")
    if method != "grid":
        return None
    ranges = [one.field for one in searched if not one.choices]
    if ranges:
        raise UsageError(f"--method: a grid needs choices, {ranges[0]} is a range.", f"--method tpe --trials {TRIALS}")
    points = list(itertools.product(*(one.choices for one in searched)))
    if trials is not None:
        raise UsageError(f"--trials: a grid trains all its {len(points)} points.", "--method random, or no --trials")
    return [dict(zip((one.field for one in searched), values, strict=True)) for values in points]


def check_samples(words: list[str], searched: list[Searched], grid: list[dict[str, str]] | None) -> None:
    """Raise now what `train` would raise later: UsageError.

    Asked for every point of a grid, which has every choice in some point; without one for each choice or end of a range
    by itself.
    """
    for point in grid or [{one.field: value} for one in searched for value in one.samples()]:
        read_train([*words, *write_flags(point)], "sweep")


def describe(job: Job, method: str, searched: list[Searched]) -> dict:
    """What makes two commands the same study: all but what is LOCAL, and the values that are searched."""
    flat = job.config()
    for one in searched:
        *parents, last = one.field.split(".")
        where = flat
        for parent in parents:
            where = where[parent]
        where.pop(last, None)
    lasting = {name: value for name, value in flat.items() if name not in (*LOCAL, "validate")}
    return json.loads(json.dumps({"search": [one.text() for one in searched], "method": method, **lasting}))


# Training


def work(queue: "Queue", words: list[str], out: Path) -> None:
    """Take points and train them until none is left. Those of other workers are waited for: they may die."""
    from fastcifar.studies.queue import WAIT_S

    display, waiting = Display(), False
    display.say(f"study {queue.study.study_name} in {queue.place()}: {queue.points} trainings")
    while True:
        task = queue.claim()
        if task is None and queue.is_complete():
            return
        if task is None:
            if not waiting:
                display.say("Waiting for the trainings of the other workers.")
            waiting = True
            time.sleep(WAIT_S)
            continue
        waiting = False
        display.say(f"{folder(out, task.point)}: {shlex.join(write_flags(task.parameters))}")
        train_point(queue, task, words, out)
        display.say(progress(queue))


def train_point(queue: "Queue", task: "Task", words: list[str], out: Path) -> None:
    """Train one point and say how good it is. However this ends, the point is not lost.

    One that fails by its own values is complete as failed.
    """
    try:
        with queue.alive(task):
            try:
                read_train(point_words(words, task.parameters), "sweep")
                result = run_trial(point_words(words, task.parameters), folder(out, task.point))
                accuracy, facts = result["val_acc"], {"seconds": result["wall_s"]}
            except UserError as error:
                if not fails_by_itself(error):
                    raise
                failed = {"failed": error.message, "hint": error.hint, "exit_code": error.exit_code}
                accuracy, facts = 0.0, failed
    except BaseException:
        queue.give_back(task)
        raise
    queue.complete(task, accuracy, facts)


def fails_by_itself(error: UserError) -> bool:
    """Whether a point's values are at fault, so that no worker would fare better.

    It diverges, or does not fit into memory, or its values do not go together, of which no range tells beforehand. A
    GPU that is gone, a full disk or lost data are the worker's.
    """
    if isinstance(error, DeviceError):
        return "memory" in error.message
    named = re.match(r"--(\w+)", error.message)
    about_the_recipe = error.exit_code == EXIT_USAGE and named is not None and named[1] in RECIPE_FIELDS
    return isinstance(error, DivergedError | UsageError) or about_the_recipe


def point_words(words: list[str], parameters: dict[str, str]) -> list[str]:
    return [*words, "--validate", *write_flags(parameters)]


def folder(out: Path, point: int) -> Path:
    return out / f"trial-{point:05d}"


def progress(queue: "Queue") -> str:
    """The study so far, in a line."""
    finished = queue.finished()
    if not finished:
        return f"0 of {queue.points} trainings done"
    times_s = [trial.user_attrs["seconds"] for trial in finished if "seconds" in trial.user_attrs]
    others = queue.running()
    left_s = statistics.mean(times_s or [0.0]) * math.ceil((queue.points - len(finished)) / (1 + others))
    return (
        f"{len(finished)} of {queue.points} trainings done, best {finished[0].value:.2%}, "
        f"{1 + others} worker{'s' * (others > 0)}, ETA {format_s(left_s)}"
    )


# What is left behind


def write_report(queue: "Queue", name: str, words: list[str], searched: list[Searched], method: str, out: Path) -> dict:
    """Write sweep.json, sweep.md and sweep.png; returns what the first holds."""
    trials = [
        {
            "point": trial.user_attrs["point"],
            "parameters": {field: str(value) for field, value in trial.params.items()},
            "val_acc": trial.value,
            "seconds": trial.user_attrs.get("seconds"),
            "worker": trial.user_attrs["worker"],
            **{key: trial.user_attrs.get(key) for key in ("failed", "hint", "exit_code")},
        }
        for trial in queue.finished()
    ]
    best = trials[0]
    report = {
        "study": name,
        "storage": queue.place(),
        "search": [one.text() for one in searched],
        "method": method,
        "commit": source_commit(),
        "best": best,
        "command": shlex.join(["fastcifar", "train", *point_words(words, best["parameters"])]),
        "trials": trials,
    }
    write_json(out / "sweep.json", report)
    write_atomically(out / "sweep.md", describe_trials(report, searched).encode())
    write_atomically(out / "sweep.png", draw(report, searched))
    return report


def describe_trials(report: dict, searched: list[Searched]) -> str:
    """sweep.md: all trainings, best first."""
    fields = [one.field for one in searched]
    rows = [
        [
            f"trial-{row['point']:05d}",
            *(short(row["parameters"][field]) for field in fields),
            "failed" if row["failed"] else f"{row['val_acc']:.2%}",
            "" if row["seconds"] is None else f"{row['seconds']:.1f}",
            row["worker"],
        ]
        for row in report["trials"]
    ]
    paragraphs = [
        f"# Study {report['study']}",
        "Accuracy on 5,000 held-out training images; the test images had no say in it. The best:",
        f"    {report['command']}",
        markdown(["trial", *fields, "accuracy", "seconds", "worker"], rows),
        *(f"trial-{row['point']:05d}: {row['failed']}" for row in report["trials"] if row["failed"]),
    ]
    return "\n\n".join(paragraphs) + "\n"


def short(value: str) -> str:
    """A number with four digits; anything else as it is."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def draw(report: dict, searched: list[Searched]) -> bytes:
    """Accuracy against each searched field, a panel each, as PNG."""
    from matplotlib.figure import Figure

    from fastcifar.report import ACCENT, INK, SECOND, png

    columns = min(COLUMNS, len(searched))
    rows = math.ceil(len(searched) / columns)
    figure = Figure(figsize=(max(5.5, 4 * columns), 3.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    trained = [row for row in report["trials"] if not row["failed"]]
    failed = [row for row in report["trials"] if row["failed"]]
    for panel, one in itertools.zip_longest(panels, searched):
        if one is None:
            panel.set_visible(False)
            continue
        places = axis_of(panel, one)
        panel.plot(
            [places(row) for row in trained],
            [100 * row["val_acc"] for row in trained],
            "o",
            color=ACCENT,
            alpha=0.6,
            clip_on=False,
        )
        for row in failed:  # at the bottom, wherever that is
            panel.plot(places(row), 0.02, "x", color=INK, transform=panel.get_xaxis_transform(), clip_on=False)
        if trained:
            panel.plot(places(trained[0]), 100 * trained[0]["val_acc"], "o", color=SECOND, markersize=9, clip_on=False)
        panel.set_xlabel(one.field)
        panel.grid(axis="y", color="#d0d7de", linewidth=0.6)
        panel.set_axisbelow(True)
    for panel in panels[::columns]:
        panel.set_ylabel("accuracy on held-out images, %")
    best = f"best {report['best']['val_acc']:.2%}"
    missing = f"; × {len(failed)} failed" if failed else ""
    figure.suptitle(f"{report['study']}, {len(report['trials'])} trainings, {best} (orange){missing}", fontsize=10)
    return png(figure)


def axis_of(panel, one: Searched) -> Callable[[dict], float]:
    """Give the panel the field's scale; returns where on it a row of the report stands."""
    try:
        numbers = [float(choice) for choice in one.choices] or [one.low, one.high]
    except ValueError:
        panel.set_xticks(range(len(one.choices)), one.choices)
        panel.set_xlim(-0.5, len(one.choices) - 0.5)
        return lambda row: one.choices.index(row["parameters"][one.field])
    if min(numbers) > 0 and max(numbers) >= LOG_FROM * min(numbers):
        panel.set_xscale("log")
    if not one.choices:
        panel.set_xlim(one.low, one.high)
    return lambda row: float(row["parameters"][one.field])


def print_report(report: dict, out: Path) -> None:
    best = report["best"]
    failed = sum(row["failed"] is not None for row in report["trials"])
    print_table(
        [
            ("best", f"{best['val_acc']:.2%} of 5,000 held-out images, trial-{best['point']:05d}"),
            ("trainings", f"{len(report['trials'])}" + f", {failed} failed" * (failed > 0)),
            ("table", str(out / "sweep.md")),
            ("picture", str(out / "sweep.png")),
        ]
    )
    print(f"\nTrain it: {report['command']}")


def name_failure(report: dict, out: Path) -> UserError:
    """That no training came to its end: with the exit code of them all, or with that of divergence."""
    error = UserError(f"Every training failed; {out / 'sweep.md'} says how.", report["best"]["hint"])
    codes = {row["exit_code"] for row in report["trials"]}
    error.exit_code = codes.pop() if len(codes) == 1 else EXIT_DIVERGED
    return error
