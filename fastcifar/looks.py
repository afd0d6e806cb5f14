"""When a training looks at the images held out for it, and what it saw."""

import math
import time
from dataclasses import dataclass

from torch import nn

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
        step, progress: where the last look was.
        accuracy: what it saw, 0..1; None before the first.
    """

    loader: Loader | None
    epoch_steps: int
    cost_s: float = 0.0
    step: int = 0
    progress: float = 0.0
    accuracy: float | None = None

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
        self.cost_s = time.monotonic() - began_s
        return {"val_accuracy": seen.accuracy, "val_loss": seen.loss}

    def ahead_s(self, end: int) -> float:
        """Seconds that the looks still to come will take in a training of `end` steps, the one at its end included."""
        if self.loader is None:
            return 0.0
        looks = max((1 - self.progress) / LOOK_EVERY, (end - self.step) / self.epoch_steps)
        return self.cost_s * math.ceil(looks - 1e-6)

    def facts(self) -> dict:
        """What a checkpoint keeps."""
        return {"step": self.step, "progress": self.progress, "accuracy": self.accuracy}
