"""One training as it was asked for: a recipe, the data, the machine and the limits."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastcifar.budget import Knot, parse_duration
from fastcifar.errors import UsageError
from fastcifar.settings import Recipe

HELD_OUT = 5000  # training images kept aside for --target, --patience and --validate
AUTO = "auto"  # the recipe that the planner chooses for a budget
TRACKERS = ("tensorboard", "mlflow")
LIMITS = ("budget", "plan", "steps", "epochs")  # the first one set counts


@dataclass(frozen=True)
class Job:
    """How long it trains: `budget`, else `plan`, else `steps`, else the recipe's epochs.

    Args:
        recipe: its name, or AUTO.
        settings: the recipe itself, overrides included.
        data: where the data set is; None looks in the usual places.
        budget: wall-clock from process start to result.json, such as "5min".
        plan: the knots of an earlier run, which make this one repeat it step by step.
        loader: what feeds the training (`loaders/feed.py`); "auto" measures.
        workers: threads or processes that make batches; None is one for each core.
        target: stop at this accuracy on 5,000 training images that are held out for it.
        patience: stop when so many looks in a row at those images saw nothing better, and keep the best weights.
        track: who else is told of the training, such as "tensorboard,mlflow" (`track.py`).
        validate: hold those images out and look at them, but train to the end.
        fallback_dataset: trained on when `dataset` is nowhere to be found.
        as_reported: the settings began as those of the report that the recipe comes from.
    """

    recipe: str
    settings: Recipe
    dataset: str = "cifar10"
    data: Path | None = None
    loader: str = "resident"
    workers: int | None = None
    device: str = "auto"
    seed: int = 0
    budget: str | None = None
    plan: list[Knot] = field(default_factory=list)
    steps: int | None = None
    target: float | None = None
    patience: int | None = None
    validate: bool = False
    track: str | None = None
    fallback_dataset: str | None = None
    as_reported: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError naming the first value that makes no sense."""
        if self.budget is not None:
            parse_duration(self.budget)
        if self.steps is not None and self.steps <= 0:
            raise UsageError(f"--steps: must be more than 0, is {self.steps}.", "--steps 200")
        if self.target is not None and not 0 < self.target < 1:
            raise UsageError(f"--target: is an accuracy between 0 and 1, not {self.target:g}.", "--target 0.94")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"--patience: must be at least 1, is {self.patience}.", "--patience 5")
        if wrong := set(self.trackers) - {*TRACKERS}:
            raise UsageError(f"--track: there is no {min(wrong)!r}; there are {', '.join(TRACKERS)}.", "--track mlflow")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers: must be at least 1, is {self.workers}.", "--workers 1")
        if self.seed < 0:
            raise UsageError(f"--seed: must not be negative, is {self.seed}.", "--seed 0")
        self.settings.check()

    @property
    def budget_s(self) -> float | None:
        return parse_duration(self.budget) if self.budget else None

    @property
    def planned(self) -> bool:
        return self.recipe == AUTO

    @property
    def trackers(self) -> list[str]:
        return [name.strip() for name in self.track.split(",")] if self.track else []

    @property
    def holds_out(self) -> bool:
        return bool(self.target or self.patience or self.validate)

    def config(self) -> dict:
        """The flat form that config.yaml holds and `--config` reads, with the one limit that counts."""
        flat = asdict(self)
        flat |= flat.pop("settings")
        limit = next(name for name in LIMITS if flat[name])
        return {name: value for name, value in flat.items() if name == limit or name not in LIMITS}
