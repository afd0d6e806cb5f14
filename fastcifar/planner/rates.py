"""How fast this machine trains a recipe's model: seconds an image, measured in well under a second on random images.

Shapes: B images of a batch, H rows, W columns.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fastcifar.devices import synchronize
from fastcifar.models.build import build_model
from fastcifar.optim.schedule import build_optimizers
from fastcifar.resize import resize
from fastcifar.settings import Recipe
from fastcifar_kernels import amx, vectors

FEW = 32  # images of the first steps, which compile and find memory
PATIENCE = 0.002  # share of a budget that a measured step should take at most
LONGEST_S = 0.15
MOST_TIMES = 3  # that a measurement is repeated
DTYPE_ROUNDS = 5
# By this share the rates of a second may miss those of a whole training. Where other programs share a matrix unit it is
# four times slower for seconds or minutes: nine trainings got 0.58 to 1.65 times the epochs planned (LOG.md).
ERROR, AMX_ERROR = 0.15, 0.5


@dataclass(frozen=True)
class Rates:
    """Seconds that training and looking take.

    Args:
        step_s: of a step with no images at all: most of it is the optimizer's.
        image_s: that each image adds to a step, by its side in pixels, at all sizes of the recipe.
        look_s: to classify an image once, of the size that the recipe ends with.
        first_s: what the very first steps took, compiling included.
        error: by what share all of these may change during a training.
    """

    step_s: float
    image_s: dict[int, float]
    look_s: float
    first_s: float
    error: float = ERROR

    def mean_image_s(self, recipe: Recipe) -> float:
        """Seconds of training for each image, in batches and stages of the recipe."""
        begins = (0.0, *(stage.until for stage in recipe.stages))
        shares = [stage.until - begin for stage, begin in zip(recipe.stages, begins, strict=False)]
        images_s = sum(share * self.image_s[stage.image_px] for stage, share in zip(recipe.stages, shares, strict=True))
        return images_s + self.step_s / recipe.batch_size

    def of_step(self, image_px: int, batch_size: int) -> float:
        """Seconds of a step."""
        return self.step_s + batch_size * self.image_s[image_px]


def measure_rates(recipe: Recipe, classes: int, device: torch.device, budget_s: float) -> Rates:
    """Train a model that is thrown away for a few steps at each image size of the recipe."""
    began_s, patience_s = time.monotonic(), min(LONGEST_S, PATIENCE * budget_s)
    model = build_model(recipe, classes, seed=0).to(device)
    optimizers = build_optimizers(model, recipe.optim, recipe.batch_size)
    dtype = getattr(torch, recipe.dtype)

    def images(count: int) -> torch.Tensor:
        x_BCHW = torch.randn(count, 3, 32, 32, device=device, dtype=dtype)
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    def time_steps(count: int, image_px: int) -> float:
        x_BCHW = images(count)
        return settled(device, patience_s, lambda: run_step(model, optimizers, resize(x_BCHW, image_px)))

    # Each of them: on a Zen 4 the line by area from 20 to 32 pixels is 13 % too low for 24 (LOG.md, 2026-11-23).
    sizes = sorted({stage.image_px for stage in recipe.stages})
    few = min(FEW, recipe.batch_size)
    whole = max(recipe.batch_size, 2 * few)
    for image_px in sizes:
        run_step(model, optimizers, resize(images(few), image_px))
    first_s = time.monotonic() - began_s
    step_s, image_s, many = 0.0, {}, whole
    for image_px in sizes:
        few_s, many = time_steps(few, image_px), min(4 * few, whole)
        many_s = time_steps(many, image_px)
        while many < whole and 2 * many_s < patience_s:
            many = min(4 * many, whole)
            many_s = time_steps(many, image_px)
        image_s[image_px] = max(many_s - few_s, 0.1 * many_s) / (many - few)
        if image_px == sizes[0]:
            step_s = max(0.0, few_s - few * image_s[image_px])
    model.eval()
    x_BCHW = resize(images(many), recipe.final_px)
    with torch.inference_mode():
        look_s = settled(device, patience_s, lambda: forward(model, x_BCHW)) / many
    on_amx = device.type == "cpu" and dtype == torch.bfloat16 and amx.available()
    return Rates(step_s, image_s, look_s, first_s, AMX_ERROR if on_amx else ERROR)


def fastest_dtype(recipe: Recipe, classes: int, device: torch.device) -> str:
    """ "bfloat16" or, where that is slower, as on a CPU without instructions for it, "float32"."""
    if device.type != "cpu" or torch.bfloat16 in vectors.LANES:
        return "bfloat16"
    if torch.float32 in vectors.LANES:  # loops of ours, and nothing that multiplies bfloat16
        return "float32"
    model = build_model(recipe, classes, seed=0).eval()
    x_BCHW = torch.randn(FEW, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    images = {name: x_BCHW.to(getattr(torch, name)) for name in ("bfloat16", "float32")}
    seconds = dict.fromkeys(images, math.inf)
    with torch.inference_mode():
        for name in [*images] * DTYPE_ROUNDS:  # in turn: the first of a process are slow, in which type they may be
            seconds[name] = min(seconds[name], timed(device, partial(forward, model, images[name])))
    return min(seconds, key=lambda name: seconds[name])


def run_step(model: nn.Module, optimizers: list[Optimizer], x_BCHW: torch.Tensor) -> None:
    """Forward, backward and the optimizers, as `train_step` does; the labels are all 0."""
    model.train()
    logits_BK = forward(model, x_BCHW)
    F.cross_entropy(logits_BK, logits_BK.new_zeros(len(logits_BK), dtype=torch.int64)).backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def forward(model: nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x_BCHW.device.type, x_BCHW.dtype, enabled=x_BCHW.dtype != torch.float32):
        return model(x_BCHW).float()


def settled(device: torch.device, patience_s: float, work: Callable[[], object]) -> float:
    """Seconds of the work, repeated while it becomes faster and time is left: the first times find no memory ready."""
    best_s = spent_s = timed(device, work)
    for _ in range(MOST_TIMES):
        if spent_s > 2 * patience_s:
            break
        seconds = timed(device, work)
        spent_s += seconds
        if seconds > 0.9 * best_s:
            return min(seconds, best_s)
        best_s = seconds
    return best_s


def timed(device: torch.device, work: Callable[[], object]) -> float:
    synchronize(device)
    began_s = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began_s
