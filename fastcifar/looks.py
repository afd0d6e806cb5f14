"""When a training looks at the images held out for it, what it saw, and whether it has seen enough."""

import math
import time
from dataclasses import dataclass, field

from torch import Tensor, nn

from fastcifar.evaluate import judge
from fastcifar.loaders.loader import Loader

LOOK_EVERY = 0.1  # of progress, at most; each look costs a second on two cores


@dataclass
class Looks:
    """The looks at the held-out images: after every epoch or 0.1 of progress, whichever comes sooner, and at the end.

    Args:
        loader: of those images; None if there are none, and so no looks.
        epoch_steps: steps of an epoch.
        cost_s: what a look takes; measured anew by each.
        target: an accuracy, 0..1, at which to stop.
        patience: stop after this many looks in a row that saw nothing better than the best before them.
        step, progress: where the last look was.
        accuracy: what it saw, 0..1; None before the first.
        best: the most that a look saw.
        best_step: where that was.
        vain: looks since then.
        best_state: with `patience`, the weights and statistics that it saw.
    """

    loader: Loader | None
    epoch_steps: int
    cost_s: float = 0.0
    target: float | None = None
    patience: int | None = None
    step: int = 0
    progress: float = 0.0
    accuracy: float | None = None
    best: float = -1.0
    best_step: int = 0
    vain: int = 0
    best_state: dict[str, Tensor] = field(default_factory=dict)

    def due(self, step: int, progress: float) -> bool:
        """Whether to look now that `step` steps are done; the end is looked at once."""
        if self.loader is None or step == self.step:
            return False
        return step >= self.step + self.epoch_steps or progress >= min(1.0, self.progress + LOOK_EVERY - 1e-9)

    def look(self, model: nn.Module, step: int, progress: float) -> dict[str, float]:
        """Look now; returns what the row of metrics is to hold."""
        assert self.loader is not None
        began_s = time.monotonic()
        seen = judge(model, self.loader)
        self.step, self.progress, self.accuracy = step, progress, seen.accuracy
        self.vain += 1
        if seen.accuracy > self.best:
            self.best, self.best_step, self.vain = seen.accuracy, step, 0
            if self.patience:
                self.best_state = {name: value.clone() for name, value in model.state_dict().items()}
        self.cost_s = time.monotonic() - began_s
        return {"val_accuracy": seen.accuracy, "val_loss": seen.loss}

    def ahead_s(self, end: int) -> float:
        """Seconds that the looks still to come will take in a training of `end` steps, the one at its end included."""
        if self.loader is None:
            return 0.0
        looks = max((1 - self.progress) / LOOK_EVERY, (end - self.step) / self.epoch_steps)
        return self.cost_s * math.ceil(looks - 1e-6)

    @property
    def enough(self) -> bool:
        reached = self.target is not None and self.best >= self.target
        return reached or (self.patience is not None and self.vain >= self.patience)

    def facts(self) -> dict:
        """What a checkpoint keeps beside `best_state`."""
        return {name: getattr(self, name) for name in ("step", "progress", "accuracy", "best", "best_step", "vain")}
