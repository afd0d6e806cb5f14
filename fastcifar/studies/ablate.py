"""`fastcifar ablate`: what a part of a recipe is worth, or which value of a field is best.

Each variant is the recipe with one thing changed, trained with the same seeds and the same 5,000 images held out. Two
variants that turn out to be the same training, such as a value that the recipe has anyway, share it.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import quote

from fastcifar.display import Display, format_s, print_columns
from fastcifar.errors import EXIT_DONE, UsageError
from fastcifar.job import Job
from fastcifar.recipes import AS_IT_IS, find_named
from fastcifar.run import pick_folder, write_atomically, write_json
from fastcifar.settings import Recipe
from fastcifar.studies.fields import has_field, read_field, split_values, write_flags
from fastcifar.studies.flags import Flags, read_train
from fastcifar.studies.study import (
    FIGURES,
    Training,
    check_study,
    markdown,
    open_study,
    over_seeds,
    percent,
    sources,
    train_each,
)

BASELINE = "baseline"
CAPTION = "Accuracies in percent, ± the standard deviation over the seeds; difference: of test with TTA, in points."
DROPOUTS = ("model.dropout", "model.block_dropout", "model.dropouts")
AUGMENTATION = {  # off; a border alone does nothing
    f"augment.{field.name}": getattr(AS_IT_IS, field.name) for field in fields(AS_IT_IS) if field.name != "border"
}


@dataclass(frozen=True)
class Ablation:
    """What was asked for: the arguments of `fastcifar ablate`.

    Args:
        without: parts of the recipe, each left out of one variant.
        vary: "FIELD=v1,v2,..." each.
        seeds: how many each variant is trained with.
        flags: of `train`, for all variants.
    """

    recipe: str
    without: list[str]
    vary: list[str]
    seeds: int
    flags: list[str]

    def command(self) -> list[str]:
        without = [word for part in self.without for word in ("--without", part)]
        vary = [word for sweep in self.vary for word in ("--vary", sweep)]
        return ["ablate", self.recipe, *without, *vary, "--seeds", str(self.seeds), *self.flags]


@dataclass(frozen=True)
class Variant:
    """The recipe with one thing changed.

    Args:
        question: the picture's panel it stands in: "without", or the field that is varied.
        value: of that field, or the part that is left out.
        words: the flags of `train`.
        job: what they describe.
    """

    name: str
    question: str
    value: str
    words: list[str]
    job: Job

    @property
    def folder(self) -> str:
        return quote(self.name.replace(" ", "-"), safe="=.,+-[]")


def flags() -> Flags:
    parser = Flags(
        "ablate",
        "RECIPE",
        "Train a recipe as it is, without some of its parts, or with other values of a field, and compare. 5,000 "
        "training images are held out. The same command with the same --out goes on where it was stopped.",
        "[--without PART] ... [--vary FIELD=VALUES] ... [--seeds N] [--out DIR]",
    )
    parts = "batchnorm, dropout, augmentation, label_smoothing, mix or tta, if the recipe has it; may be repeated"
    parser.add_argument("--without", metavar="PART", action="append", default=[], help=parts)
    values = "another training for each value, such as optim.lr=1e-3,3e-3 or dropout=0,0.1,0.5; may be repeated"
    parser.add_argument("--vary", metavar="FIELD=VALUES", action="append", default=[], help=values)
    parser.add_seeds()
    parser.add_out("a new one in runs/")
    return parser


def run(words: list[str]) -> int:
    """Make the study that these words ask for; returns the exit code. Raises what `ablate` raises."""
    [recipe], own, rest = flags().split(words)
    ablate(Ablation(recipe, own.without, own.vary, own.seeds, rest), own.out, Display())
    return EXIT_DONE


def ablate(asked: Ablation, out: Path | None, display: Display) -> dict:
    """Train every variant; write ablation.json, ablation.md and ablation.png; print the table; return the first.

    Nothing is trained before all flags of all variants were found to be right.

    Raises UsageError, and what a training raises; one that diverges is a row of the table.
    """
    variants = plan(asked)
    path = out or pick_folder(f"ablate-{asked.recipe}")
    open_study(path, asked.command())
    trainings = plan_trainings(asked, variants, path)
    again = shlex.join(["fastcifar", *asked.command(), "--out", str(path)])
    outcomes = dict(
        zip((training.folder for training in trainings), train_each(trainings, display, again), strict=True)
    )
    report = describe(asked, variants, path, outcomes)
    headings, rows = tabulate(report)
    write_json(path / "ablation.json", report)
    write_atomically(
        path / "ablation.md",
        f"{title(report)}, {report['machine']}\n\n{markdown(headings, rows)}\n\n{CAPTION}\n".encode(),
    )
    write_atomically(path / "ablation.png", draw(report))
    print_columns(headings, rows)
    print(f"\n{CAPTION}\n{path / 'ablation.png'}")
    return report


# Which variants there are


def plan(asked: Ablation) -> list[Variant]:
    """The variants in the order of the table. Raises UsageError for the first value that makes no sense."""
    find_named(asked.recipe)
    check_study("ablate", asked.seeds, asked.flags)
    if not asked.without and not asked.vary:
        raise UsageError(
            "ablate: say what to compare the recipe with: --without PART or --vary FIELD=VALUES.",
            f"fastcifar ablate {asked.recipe} --vary batch_size=250,500",
        )
    common = ["--recipe", asked.recipe, *asked.flags, "--validate"]
    recipe = read_train(common, "ablate")[0].settings

    def variant(name: str, question: str, value: str, changed: dict[str, str]) -> Variant:
        words = [*common, *write_flags(changed)]
        return Variant(name, question, value, words, read_train(words, "ablate")[0])

    variants = [variant(BASELINE, "without", "nothing", {})] if asked.without else []
    parts = [part.replace("-", "_") for part in asked.without]
    variants += [variant(f"without {part}", "without", part, turn_off(recipe, part)) for part in parts]
    sweeps = [(field, value) for sweep in asked.vary for field, value in read_sweep(sweep)]
    variants += [
        variant(f"{field}={value}", field, value, set_field(asked.recipe, recipe, field, value))
        for field, value in sweeps
    ]
    return list({variant.name: variant for variant in variants}.values())


def turn_off(recipe: Recipe, part: str) -> dict[str, str]:
    """{field: the value without this part}. Raises UsageError if the recipe does not have it."""
    parts = removable(recipe)
    if part not in parts:
        can = f"from this recipe can be taken: {', '.join(parts)}" if parts else "this recipe has nothing to take away"
        hint = f"--without {next(iter(parts))}" if parts else "--vary FIELD=VALUES"
        raise UsageError(f"--without: there is no {part} to take away; {can}.", hint)
    return {field: write_value(off) for field, off in parts[part].items()}


def removable(recipe: Recipe) -> dict[str, dict[str, object]]:
    """The parts that the recipe has: {part: {field that is on: its value when off}}."""
    parts: dict[str, dict[str, object]] = {
        "batchnorm": {"model.batchnorm": False},
        "dropout": {field: scale_dropout(recipe, field, 0.0) for field in dropouts(recipe)},
        "augmentation": AUGMENTATION,
        "label_smoothing": {"label_smoothing": 0.0},
        "mix": {"mix": "none"},
        "tta": {"tta.share": 0.0},
    }
    on = {
        part: {
            field: off for field, off in fields.items() if has_field(recipe, field) and read_field(recipe, field) != off
        }
        for part, fields in parts.items()
    }
    return {part: fields for part, fields in on.items() if fields}


def read_sweep(sweep: str) -> list[tuple[str, str]]:
    """(field, value) for each value of "batch_size=64,128". Commas inside brackets belong to a value."""
    field, _, values = sweep.partition("=")
    split = split_values(values)
    if not field or not all(split):
        raise UsageError(f"--vary: {sweep!r} is not FIELD=VALUE,VALUE.", "--vary batch_size=250,500")
    return [(field.replace("-", "_"), value) for value in split]


def set_field(name: str, recipe: Recipe, field: str, value: str) -> dict[str, str]:
    """{field: value}, or that of each dropout which the recipe uses. Raises UsageError: it has no such field."""
    if field == "dropout":
        used = dropouts(recipe)
        if not used:
            raise UsageError(f"--vary: recipe {name} uses no dropout.", f"fastcifar recipes show {name}")
        try:
            return {one: write_value(scale_dropout(recipe, one, float(value))) for one in used}
        except ValueError as error:
            raise UsageError(
                f"--vary: dropout is a number from 0 to 1, not {value!r}.", "--vary dropout=0,0.1"
            ) from error
    if not has_field(recipe, field):
        raise UsageError(f"--vary: recipe {name} has no field {field}.", f"fastcifar recipes show {name}")
    return {field: value}


def dropouts(recipe: Recipe) -> list[str]:
    """The fields of dropout that are not 0."""
    return [field for field in DROPOUTS if has_field(recipe, field) and any(each(read_field(recipe, field)))]


def scale_dropout(recipe: Recipe, field: str, value: float) -> object:
    """`value` in place of all that is not 0: a number, or a tuple of them."""
    before = read_field(recipe, field)
    return tuple(value if old else old for old in before) if isinstance(before, Sequence) else value


def each(value: object) -> Sequence:
    return value if isinstance(value, Sequence) else (value,)


def write_value(value: object) -> str:
    """As the command line takes it."""
    return str(list(value)) if isinstance(value, tuple) else str(value)


def plan_trainings(asked: Ablation, variants: list[Variant], path: Path) -> list[Training]:
    """The different trainings of all variants, every variant with one seed before the next seed."""
    homes = {home(variant, variants).name: variant for variant in reversed(variants)}
    different = [variant for variant in variants if variant.name in homes]
    return [
        Training(
            f"variant {place} of {len(different)}, {variant.name}, seed {seed}",
            [*variant.words, "--seed", str(seed)],
            path / variant.folder / f"seed{seed}",
        )
        for seed in range(asked.seeds)
        for place, variant in enumerate(different, 1)
    ]


def home(variant: Variant, variants: list[Variant]) -> Variant:
    """The first variant that is the same training; its folder holds the runs of both."""
    return next(other for other in variants if other.job == variant.job)


# What came out


def describe(asked: Ablation, variants: list[Variant], path: Path, outcomes: dict[Path, dict]) -> dict:
    """ablation.json: accuracies are shares of 1; `mean` and `spread` (sample standard deviation) are over the seeds.

    `difference` is that of test accuracy with test-time augmentation to the recipe as it is, where that was trained.
    """
    common, _ = read_train(["--recipe", asked.recipe, *asked.flags, "--validate"], "ablate")
    entries = []
    for variant in variants:
        folder = home(variant, variants).folder
        runs = {seed: outcomes[path / folder / f"seed{seed}"] for seed in range(asked.seeds)}
        entries.append(
            {
                "variant": variant.name,
                "question": variant.question,
                "value": variant.value,
                "as_recipe": variant.job == common,
                "flags": variant.words,
                "folder": folder,
                **over_seeds(runs),
            }
        )
    own = next((entry["mean"] for entry in entries if entry["as_recipe"]), {})
    for entry in entries:
        comparable = own and entry["mean"] and not entry["as_recipe"]
        entry["difference"] = entry["mean"]["test_acc_tta"] - own["test_acc_tta"] if comparable else None
    return {
        "recipe": asked.recipe,
        "as_reported": common.as_reported,
        "flags": asked.flags,
        **sources(list(outcomes.values())),
        "variants": entries,
    }


def title(report: dict) -> str:
    way = " as reported" if report["as_reported"] else ""
    return f"Recipe {report['recipe']}{way}, {report['dataset'] or 'nothing trained'}"


def tabulate(report: dict) -> tuple[list[str], list[list[str]]]:
    """The table: headings, and a row for each variant. Accuracies in percent, differences in points."""
    headings = ["variant", "validation, end", "best", "test", "with TTA", "difference", "training"]
    rows = []
    for entry in report["variants"]:
        lost = sum("diverged" in run for run in entry["seeds"])
        name = entry["variant"] + (" (as the recipe)" if entry["as_recipe"] and entry["variant"] != BASELINE else "")
        if not entry["mean"]:
            rows.append([name, "diverged", "", "", "", "", ""])
            continue
        accuracies = [percent(entry, key) for key in FIGURES[:4]]
        difference = "" if entry["difference"] is None else f"{100 * entry['difference']:+.2f}"
        name += f" ({lost} of {len(entry['seeds'])} diverged)" if lost else ""
        rows.append([name, *accuracies, difference, format_s(entry["mean"]["train_s"])])
    return headings, rows


# The picture


def draw(report: dict) -> bytes:
    """A panel for each question: accuracy on held-out and on test images, a bar where there are several seeds; PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fastcifar.report import INK, png

    questions = list(dict.fromkeys(entry["question"] for entry in report["variants"]))
    panels = {name: ordered([e for e in report["variants"] if e["question"] == name]) for name in questions}
    widths = [max(3.2, 1.2 + 0.8 * len(entries)) for entries in panels.values()]
    with rc_context({"font.family": "sans-serif", "font.size": 9, "axes.edgecolor": "#8c959f", "text.color": INK}):
        width = max(4.8, sum(widths) + 0.6)
        figure = Figure(figsize=(width, 4.2), layout="constrained")
        row = figure.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=widths)[0]
        for axes, (question, entries) in zip(row, panels.items(), strict=True):
            draw_panel(axes, question, entries)
        row[0].set_ylabel("accuracy, %")
        legend = {label: mark for axes in row for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(
            legend.values(), legend.keys(), frameon=False, loc="outside lower left", ncols=3 if width > 6 else 1
        )
        figure.suptitle(f"{title(report)}\n{report['machine']}", x=0.01, ha="left", fontsize=9)
        return png(figure)


def ordered(entries: list[dict]) -> list[dict]:
    """By value where all values are numbers, else as they were named."""
    return sorted(entries, key=lambda entry: float(entry["value"])) if are_numbers(entries) else entries


def are_numbers(entries: list[dict]) -> bool:
    return all(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", entry["value"]) for entry in entries)


def draw_panel(axes, question: str, entries: list[dict]) -> None:
    """One question's points, evenly spaced: values of a sweep are often far apart, or begin with 0."""
    from fastcifar.report import ACCENT, SECOND

    for figure, colour, shift, label in (
        ("val_acc", SECOND, -0.08, "held out, at the end"),
        ("test_acc_tta", ACCENT, 0.08, "test, with TTA"),
    ):
        points = [(x + shift, entry) for x, entry in enumerate(entries) if entry["mean"]]
        where = [x for x, _ in points]
        means = [100 * entry["mean"][figure] for _, entry in points]
        spreads = [100 * (entry["spread"][figure] or 0) for _, entry in points]
        style = "o-" if are_numbers(entries) else "o"
        axes.errorbar(
            where, means, spreads, fmt=style, color=colour, markersize=5, linewidth=1, elinewidth=1.4, capsize=3,
            label=label,
        )  # fmt: skip
    for x, entry in enumerate(entries):
        if not entry["mean"]:
            axes.text(x, 0.04, "diverged", transform=axes.get_xaxis_transform(), ha="center", color=SECOND, rotation=90)
        elif entry["as_recipe"]:
            axes.axhline(
                100 * entry["mean"]["test_acc_tta"],
                color="#8c959f",
                linewidth=0.8,
                linestyle="--",
                zorder=0,
                label="test, the recipe as it is",
            )
    labels = [entry["value"].replace("_", "\n") for entry in entries] if question == "without" else None
    axes.set_xticks(range(len(entries)), labels or [entry["value"] for entry in entries])
    axes.set_xlim(-0.5, len(entries) - 0.5)
    axes.set_title(question, loc="left")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
