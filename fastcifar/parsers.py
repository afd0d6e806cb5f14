"""What may be typed: a parser for each verb, the flags of `train` taken from the fields of the recipe it names."""

import argparse
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from fastcifar import __version__
from fastcifar.budget import Knot
from fastcifar.errors import UsageError
from fastcifar.job import AUTO, Job
from fastcifar.recipes import find_named, find_recipe
from fastcifar.settings import Recipe, ResNet34Model

DATASETS = Literal["cifar10", "cifar100", "shapes10"]
LOADERS = Literal["resident", "ffcv", "dali", "torch"]
DEFAULT_RECIPE = "speed"  # without a budget, or when one of its fields is given
RECIPE_FIELDS = [field.name for field in fields(Recipe) if field.name != "epochs"]  # those are a flag like --steps
LIMITS = ("budget", "epochs", "steps")
STUDIES = {  # which have parsers of their own, in studies/
    "ablate": "what each part of a recipe is worth, or which value of a field is best",
    "reproduce": "train the recipes of the reports, beside what was reported",
    "sweep": "search the values of a recipe's fields that train best, on one machine or many",
    "tune": "find a learning rate, or a batch size for this machine",
}


def parse(words: list[str], verb: str = "") -> Namespace:
    """What the words say; of `train` also `given`, the flags that were typed or stand in a config.

    Raises UsageError naming the flag that is wrong, and the help of `verb`, if it is another than the first word.
    """
    parser = build_parser(words)
    try:
        given = parser.parse_args(words, defaults=False)
        chosen = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        raise UsageError(
            " ".join(str(error).split()), " ".join(["fastcifar", *([verb] if verb else words[:1]), "--help"])
        ) from error
    if "train" in given:
        settle(chosen["train"], given["train"], {word.partition("=")[0] for word in words})
    return chosen


def settle(chosen: Namespace, given: Namespace, typed: set[str]) -> None:
    """A field without a recipe is one of DEFAULT_RECIPE's; how long to train is typed rather than in a config."""
    chosen.given = sorted(given.keys())
    if chosen.recipe == AUTO and any(name in given for name in RECIPE_FIELDS):
        chosen.recipe = DEFAULT_RECIPE
    if any(f"--{limit}" in typed for limit in LIMITS):
        for limit in LIMITS:
            if f"--{limit}" not in typed:
                chosen[limit] = None


def read_job(chosen: Namespace) -> Job:
    """The job that the flags of `train` describe. Raises UsageError."""
    limits = [f"--{name}" for name in LIMITS if chosen[name] is not None]
    if len(limits) > 1:
        raise UsageError(f"{' and '.join(limits)} cannot both say how long to train.", f"only {limits[0]}")
    recipe = {name: chosen[name] for name in RECIPE_FIELDS}
    found = find_recipe(DEFAULT_RECIPE if chosen.recipe == AUTO else chosen.recipe, chosen.as_reported)
    settings = Recipe(**recipe, epochs=found.epochs if chosen.epochs is None else chosen.epochs)  # type: ignore[arg-type]
    names = [field.name for field in fields(Job) if field.name != "settings"]
    job = {name: chosen[name] for name in names} | ({"plan": []} if limits else {})
    if chosen.data is not None:
        job["data"] = absolute(chosen.data)
    if isinstance(settings.model, ResNet34Model) and settings.model.weights not in ("", "imagenet"):
        weights = absolute(Path(settings.model.weights))
        settings = replace(settings, model=replace(settings.model, weights=str(weights)))
    if chosen.recipe == AUTO and not chosen.budget:
        job["recipe"] = DEFAULT_RECIPE
    return Job(settings=settings, **job)  # type: ignore[arg-type]


def absolute(path: Path) -> Path:
    """For config.yaml, which may be read from another folder. A home that nobody has is left as it is."""
    return Path(os.path.expanduser(path)).absolute()


def build_parser(words: list[str]) -> ArgumentParser:
    """The parser of all verbs; the defaults of `train` are those of the recipe that `words` name."""
    parser = ArgumentParser(
        prog="fastcifar",
        description="The fastest honest way to train a CIFAR-10 or CIFAR-100 model.",
        version=f"fastcifar {__version__}",
        exit_on_error=False,
        allow_abbrev=False,  # what finds the recipe's name before all else knows whole flags only
    )
    verbs = parser.add_subcommands()
    verbs.add_subcommand("train", train_parser(words), help="train a model, inside a wall-clock budget if one is given")
    verbs.add_subcommand("plan", plan_parser(), help="what a budget would be spent on here, and what to expect of it")
    verbs.add_subcommand(
        "eval", eval_parser(), help="evaluate a trained run: accuracy, precision, recall, F1, confusions"
    )
    verbs.add_subcommand("data", data_parser(), help="prepare, verify or describe a data set")
    verbs.add_subcommand("recipes", recipes_parser(), help="list the recipes or show one")
    bench = ArgumentParser(exit_on_error=False, description="Measure, on the GPU if there is one.")
    verbs.add_subcommand("bench", bench, help="measure the kernels, the loaders or training")
    add_benchmarks(bench)  # jsonargparse wants a parser to have its place before it gets verbs of its own
    for verb, help in STUDIES.items():
        verbs.add_subcommand(verb, ArgumentParser(exit_on_error=False), help=help)
    verbs.add_subcommand("verify-kernels", verify_parser(), help="do the kernels agree with float64, on this machine?")
    verbs.add_subcommand("doctor", ArgumentParser(exit_on_error=False), help="what works on this machine, and why not")
    return parser


def plan_parser() -> ArgumentParser:
    parser = ArgumentParser(
        exit_on_error=False,
        description="Measure this machine for a few seconds and say what `train --budget` would do.",
    )
    parser.add_argument("--budget", type=str, required=True, help="wall-clock: 90s, 5min, 1h30m")
    parser.add_argument("--dataset", type=DATASETS, default="cifar10", help="what to train on")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--json", action="store_true", help="print everything on one line, the last of stdout")
    return parser


def eval_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description="Evaluate a trained run on the test images.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--data", type=Path | None, default=None, help="where the data set is, if not where it was")
    parser.add_argument("--loader", type=LOADERS | None, default=None, help="what reads the images, if not as trained")
    add_workers_argument(parser)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--json", action="store_true", help="print everything on one line, the last of stdout")
    return parser


def data_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description="Prepare, verify, describe or convert a data set.")
    verbs = (
        "prepare: find or download it and write the cache file; "
        "verify: compare every image with the official set; info: describe it; "
        "write: write it in the format of a loading library"
    )
    parser.add_argument("verb", type=Literal["prepare", "verify", "info", "write"], help=verbs)
    add_data_arguments(parser)
    parser.add_argument("--format", type=Literal["ffcv", "dali"] | None, default=None, help="write: whose format")
    parser.add_argument(
        "--out", type=Path | None, default=None, help="write: the folder (default: one in the cache folder)"
    )
    return parser


def recipes_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description="List the recipes or show one.")
    parser.add_argument(
        "verb", type=Literal["list", "show"], help="list: a line each; show: every field, as --config takes it"
    )
    parser.add_argument("name", type=str, nargs="?", default=DEFAULT_RECIPE, help="which one to show")
    parser.add_argument("--as_reported", action="store_true", help="with the hyperparameters of its report")
    return parser


def add_benchmarks(parser: ArgumentParser) -> None:
    what = parser.add_subcommands()
    kernels = ArgumentParser(exit_on_error=False, description="Each operator, forward and backward.")
    kernels.add_argument("--out", type=Path | None, default=None, help="write one JSON line for each row to this file")
    what.add_subcommand("kernels", kernels, help="the kernels beside eager and compiled PyTorch")
    loaders = ArgumentParser(exit_on_error=False, description="Images a second of each loader, by number of workers.")
    add_data_arguments(loaders)
    loaders.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:1")
    loaders.add_argument(
        "--out", type=Path | None, default=None, help="write a JSON file, and a chart (.png) beside it"
    )
    what.add_subcommand("loaders", loaders, help="the loaders beside what a training step takes")
    train = ArgumentParser(exit_on_error=False, description="Images a second, TFLOP/s, memory and energy by recipe.")
    train.add_argument("--recipe", nargs="+", type=str, default=[], help="which (default: one of each kind)")
    add_data_arguments(train, None)
    train.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:1")
    train.add_argument("--seeds", type=int, default=0, help="also so many complete trainings of each, on all GPUs")
    train.add_argument("--target", type=float | None, default=None, help="test that their mean accuracy is above this")
    train.add_argument("--out", type=Path | None, default=None, help="write a JSON file, the trainings beside it")
    what.add_subcommand("train", train, help="how fast this GPU trains, and how much of its peak that is")


def verify_parser() -> ArgumentParser:
    parser = ArgumentParser(
        exit_on_error=False, description="Compare every kernel with float64; exit code 1 on a miss."
    )
    parser.add_argument("--op", nargs="+", type=str, default=[], help="only these operators, such as weighted_sum")
    return parser


def add_data_arguments(parser: ArgumentParser, dataset: str | None = "cifar10") -> None:
    """Args: dataset: the default; None is each recipe's own."""
    kind, help = (DATASETS, "what to use") if dataset else (DATASETS | None, "what to use (default: the recipe's)")
    parser.add_argument("--dataset", type=kind, default=dataset, help=help)
    parser.add_argument(
        "--data", type=Path | None, default=None, help="where it is: archive, folder, PNG tree, parquet, `data write`"
    )


def add_workers_argument(parser: ArgumentParser) -> None:
    help = "threads or processes that make batches (default: one for each core)"
    parser.add_argument("--workers", type=int | None, default=None, help=help)


def train_parser(words: list[str]) -> ArgumentParser:
    parser = ArgumentParser(
        exit_on_error=False,
        description="Train a model. Any field of the recipe can be overridden by its dotted name.",
    )
    parser.add_argument("--config", action="config", help="a YAML file of these flags, such as runs/NAME/config.yaml")
    parser.add_argument(
        "--recipe",
        type=str,
        default=AUTO,
        help=f"see `fastcifar recipes list`; auto: what a --budget buys most with, else {DEFAULT_RECIPE}",
    )
    parser.add_argument(
        "--as_reported", action="store_true", help="with the hyperparameters of the report that the recipe comes from"
    )
    name, as_reported = named_recipe(words)
    recipe = find_recipe(name, as_reported)
    add_data_arguments(parser, find_named(name).dataset)
    parser.add_argument(
        "--fallback_dataset",
        type=Literal["shapes10"] | None,
        default=None,
        help="train on this one if the data set is nowhere to be found",
    )
    parser.add_argument(
        "--loader", type=Literal[LOADERS, "auto"], default="resident", help="what feeds the training; auto measures"
    )
    add_workers_argument(parser)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument(
        "--budget", type=str | None, default=None, help="wall-clock from process start to result.json: 90s, 5min, 1h30m"
    )
    parser.add_argument(
        "--epochs", type=float | None, default=None, help="passes over the training set, instead of a budget"
    )
    parser.add_argument("--steps", type=int | None, default=None, help="steps, instead of a budget")
    parser.add_argument(
        "--target", type=float | None, default=None, help="stop at this accuracy on 5,000 held-out training images"
    )
    parser.add_argument(
        "--patience",
        type=int | None,
        default=None,
        help="stop when that many looks in a row at those 5,000 brought nothing better, and keep the best weights",
    )
    parser.add_argument(
        "--validate", action="store_true", help="hold out those 5,000 and say what the model makes of them"
    )
    parser.add_argument(
        "--track", type=str | None, default=None, help="tell tensorboard, mlflow or tensorboard,mlflow of the run, too"
    )
    parser.add_argument("--plan", type=list[Knot], default=[], help="the schedule of an earlier run (config.yaml)")
    parser.add_argument("--out", type=Path | None, default=None, help="the run folder (default: a new one in runs/)")
    parser.add_argument(
        "--resume", type=Path | None, default=None, help="go on with the interrupted run in this folder"
    )
    parser.add_argument("--json", action="store_true", help="print result.json as the last line of stdout")
    # A model and an optimizer are of the kind that the recipe has.
    parser.add_class_arguments(Recipe, skip={"epochs", "model", "optim"})
    parser.add_class_arguments(type(recipe.model), "model")
    parser.add_class_arguments(type(recipe.optim), "optim")
    parser.set_defaults({name: value for name, value in asdict(recipe).items() if name != "epochs"})
    return parser


def named_recipe(words: list[str]) -> tuple[str, bool]:
    """The recipe that --recipe, else --config names, and whether as reported, before anything else is parsed."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config", type=Path)
    first.add_argument("--as_reported", action="store_true")
    known = first.parse_known_args(words)[0]
    content = {}
    if known.config is not None and known.config.is_file():
        import yaml

        try:
            read = yaml.safe_load(known.config.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            message = f"--config: {known.config} is no YAML file: {' '.join(str(error).split())}."
            raise UsageError(message, "fastcifar recipes show speed") from error
        content = read if isinstance(read, dict) else {}
    name = known.recipe or str(content.get("recipe", AUTO))
    return DEFAULT_RECIPE if name == AUTO else name, known.as_reported or bool(content.get("as_reported"))
