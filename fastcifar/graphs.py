"""A training step as one CUDA graph: recorded once, then started by a single call from Python.

Most kernels of a small network take less time than starting them one by one does (not measured here yet). What a graph
has recorded stays as it is, so there is one for each image size and for each set of weights that learns, all recorded
before the first step; the images, their labels and the learning rates are read from tensors that keep their place.
Augmentation is not in it: so any loader may feed it, and it costs a copy of the batch, 12 MB for 2,000 images.

Shapes: B images of a batch, C channels, H rows, W columns.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastcifar.budget import stage_at
from fastcifar.optim.schedule import set_learning_rates
from fastcifar.settings import Recipe

WARM_UPS = 3  # before recording: compiling, cuDNN's choice of algorithms, the optimizers' state

Outputs = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, int], Outputs]  # (images, labels, their size) to what the step returns


def can_record(recipe: Recipe) -> bool:
    """Not what asks the device for a number (float16's scaler) or Python for one each step (mixup, cutmix)."""
    return recipe.dtype != "float16" and recipe.mix == "none"


class StepGraphs:
    """`step`, recorded for every image size and set of learning weights of a recipe.

    Args:
        x_BCHW, y_B: a batch such as all others; any values.
    """

    def __init__(
        self,
        step: Step,
        recipe: Recipe,
        model: nn.Module,
        optimizers: list[Optimizer],
        x_BCHW: Tensor,
        y_B: Tensor,
    ):
        self.weights = [
            weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]
        ]
        self.x_BCHW, self.y_B = torch.empty_like(x_BCHW).copy_(x_BCHW), y_B.clone()
        self.recorded: dict[tuple[int, int], tuple[Callable[[], None], Outputs]] = {}
        with untouched(model, optimizers):
            for progress in turning_points(recipe, optimizers):
                set_learning_rates(optimizers, progress, recipe.optim)
                image_px = stage_at(recipe.stages, progress).image_px
                if self.key(image_px) not in self.recorded:
                    self.recorded[self.key(image_px)] = record(lambda px=image_px: step(self.x_BCHW, self.y_B, px))

    def key(self, image_px: int) -> tuple[int, int]:
        return image_px, sum(weight.requires_grad for weight in self.weights)

    def __call__(self, x_BCHW: Tensor, y_B: Tensor, image_px: int) -> Outputs:
        self.x_BCHW.copy_(x_BCHW)
        self.y_B.copy_(y_B)
        replay, outputs = self.recorded[self.key(image_px)]
        replay()
        return tuple(output.clone() for output in outputs)  # the next replay writes over them


def turning_points(recipe: Recipe, optimizers: list[Optimizer]) -> list[float]:
    """Where in a training, in progress, another image size begins or a weight stops learning."""
    untils = {group["until"] for optimizer in optimizers for group in optimizer.param_groups}
    return sorted({0.0} | {point for point in untils | {stage.until for stage in recipe.stages} if point < 1})


def record(work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """(what does the work again, where its results are then). Does the work several times."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # a graph of another recipe that is collected meanwhile would spoil this one
    try:
        with torch.cuda.graph(graph):
            outputs = work()
    finally:
        gc.enable()
    return graph.replay, outputs


@contextmanager
def untouched(model: nn.Module, optimizers: list[Optimizer]) -> Iterator[None]:
    """Afterwards weights, statistics, the optimizers' state, random numbers and who learns are what they were before.

    Every tensor keeps its place in memory. State that an optimizer did not have yet is 0 afterwards, as it begins.
    """
    weights = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
    learning = [weight.requires_grad for weight in weights]
    before = [(tensor, tensor.clone()) for tensor in (*model.state_dict().values(), *state_of(optimizers))]
    random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    yield
    known = {id(tensor) for tensor, _ in before}
    for tensor in state_of(optimizers):
        if id(tensor) not in known:
            tensor.zero_()
    for tensor, value in before:
        tensor.copy_(value)
    for weight, learns in zip(weights, learning, strict=True):
        weight.requires_grad_(learns)
    torch.set_rng_state(random[0])
    if random[1]:
        torch.cuda.set_rng_state_all(random[1])


def state_of(optimizers: list[Optimizer]) -> Iterable[Tensor]:
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
