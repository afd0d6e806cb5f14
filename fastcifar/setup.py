"""Everything a training needs before its first step: data, loaders, model, optimizers, warmed up.

Shapes: N images, B of a batch, C channels, H rows, W columns.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from fastcifar.budget import stage_at
from fastcifar.data import source
from fastcifar.data.dataset import Dataset
from fastcifar.devices import pick_device, synchronize
from fastcifar.display import Display
from fastcifar.errors import DataMissing, UsageError
from fastcifar.evaluate import predict
from fastcifar.graphs import turning_points, untouched
from fastcifar.job import HELD_OUT, Job
from fastcifar.loaders.feed import Feed, open_feed, pick_feed
from fastcifar.loaders.loader import Loader
from fastcifar.models.build import build_model
from fastcifar.models.global_norm import share_statistics
from fastcifar.models.speednet import SpeedNet
from fastcifar.optim.schedule import build_optimizers, set_learning_rates
from fastcifar.planner.choose import Choice, choose, fit
from fastcifar.planner.rates import Rates, measure_rates
from fastcifar.process import physical_cores
from fastcifar.ranks import ALONE, Ranks
from fastcifar.resize import resize
from fastcifar.settings import Recipe, SpeedNetModel
from fastcifar_kernels.layout import GROUP

EVALUATION_BATCH = 1000
COMPILE_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # graphs.py records its own
WHITENING_IMAGES = 1000  # 961,000 patches, for a 12 x 12 covariance: 0.02 s, where 5,000 take 0.3


@dataclass(frozen=True)
class Setup:
    """What `set_up` made. `forward` is the model, compiled where that pays; both share their weights."""

    name: str  # of the recipe: the job's, or what the planner chose
    recipe: Recipe  # with a budget: fitted to it
    choice: Choice | None  # the planner's
    rates: Rates | None  # with a budget: how fast this machine trains the recipe, as far as that was measured
    dataset: Dataset
    ranks: Ranks
    device: torch.device
    feed: Feed
    loader: Loader
    test_loader: Loader
    held_out_loader: Loader | None
    model: nn.Module
    forward: nn.Module
    optimizers: list[Optimizer]
    scaler: torch.amp.GradScaler  # for float16; for all else it does nothing
    compile_s: float
    look_s: float  # to evaluate one image once
    wait_every: int  # most steps between two times that the program waits for the device


def set_up(job: Job, display: Display, spent_s: Callable[[], float] = lambda: 0.0, ranks: Ranks = ALONE) -> Setup:
    """Everything, ready for the first step.

    Args:
        spent_s: seconds of the budget gone by now.
        ranks: the processes that train together; each gets its part of every batch.

    Raises DataError, DeviceError, UsageError.
    """
    recipe = job.settings
    device = pick_device(job.device)
    if recipe.dtype == "float16" and device.type == "cpu":
        raise UsageError("--dtype: float16 is a thousand times slower than bfloat16 on a CPU.", "--dtype bfloat16")
    with ranks.first_here():
        dataset = open_dataset(job, display)
    train_N, held_out_N = hold_out(dataset, HELD_OUT, job.seed) if job.holds_out else (None, None)
    images = len(dataset.train) if train_N is None else len(train_N)
    if recipe.batch_size > images:
        raise UsageError(
            f"--batch_size: {recipe.batch_size} is more than the {images} training images of {dataset.name}.",
            f"--batch_size {images}",
        )
    if recipe.batch_size % ranks.count:
        whole = max(1, recipe.batch_size // ranks.count) * ranks.count
        raise UsageError(
            f"--batch_size: {recipe.batch_size} images cannot be divided among {ranks.count} processes.",
            f"--batch_size {whole}",
        )

    classes = len(dataset.class_names)
    choice, rates, compile_s, image_s = None, None, 0.0, 0.0
    if job.planned:
        each = images // ranks.count  # to train on: what one process is as fast at as all are at all images
        choice = ranks.same(choose(dataset.name, each, classes, device, job.budget_s or 0.0, spent_s)[0])
        if not dataset.verified:  # the curves were measured on the real images
            choice = replace(choice, expected=None)
        display.say(f"plan: {choice}")
        recipe, rates = choice.recipe, choice.rates
        compile_s, image_s = rates.first_s, rates.mean_image_s(recipe)
    elif job.loader == "auto" or (job.budget_s and recipe.min_steps):
        rates = measure_rates(recipe, classes, device, job.budget_s or 60.0)
        compile_s, image_s = rates.first_s, rates.mean_image_s(recipe)
        if job.budget_s:
            left_s = job.budget_s - spent_s()
            each = images // ranks.count
            recipe = ranks.same(fit(job.recipe, recipe, rates, None, each, job.budget_s, left_s).recipe)
    recipe = replace(recipe, batch_size=recipe.batch_size // ranks.count * ranks.count)  # a half of it may be odd
    # Image sizes are few and fixed from here on, so cuDNN may try its algorithms once for each.
    torch.backends.cudnn.benchmark = True

    dtype = getattr(torch, recipe.dtype)

    def open_named(name: str) -> Feed:
        where = {"data": job.data, "progress": display.work}
        return open_feed(name, dataset, workers=job.workers or physical_cores(), device=device, dtype=dtype, **where)

    def train_loader(feed: Feed) -> Loader:
        options = {"shuffle": True, "seed": job.seed, "augment": recipe.augment, "places_N": train_N}
        part = {"batch_size": recipe.batch_size // ranks.count, "part": (ranks.rank, ranks.count)}
        return feed.loader("train", **part, **options)

    with ranks.first_here():
        feed = open_named("resident" if job.loader == "auto" else job.loader)
    display.close()
    loader = train_loader(feed)
    began_s = time.monotonic()
    x_NCHW = loader.take(torch.arange(min(WHITENING_IMAGES, images)))
    resize(x_NCHW[:1], recipe.stages[0].image_px)  # compiled at its first use
    compile_s += time.monotonic() - began_s  # nearly all of it: the images themselves take 10 ms
    model = build_model(recipe, classes, job.seed).to(device)
    nets = [part for part in model.modules() if isinstance(part, SpeedNet)]
    if isinstance(recipe.model, SpeedNetModel):
        for net in nets:
            net.fit_whitening(x_NCHW, recipe.model.whiten_eps)
    ranks.take_state(model)
    share_statistics(model, ranks)
    optimizers = build_optimizers(model, recipe.optim, recipe.batch_size)
    if any(net.blocks_pay(x_NCHW[:GROUP]) for net in nets):
        compile_s += warm_up(model, model, optimizers, recipe, x_NCHW[:GROUP])
    look_s = time_a_look(model, loader, recipe.final_px)
    if job.loader == "auto":
        feed, loader, why = pick_feed(1 / image_s, open_named, train_loader)
        if feed.name != (first := ranks.same(feed.name)):
            feed = open_named(first)
            loader = train_loader(feed)
        display.say(why)
    evaluation_loader = partial(feed.loader, batch_size=EVALUATION_BATCH, image_px=recipe.final_px)
    test_loader = evaluation_loader("test")
    held_out_loader = None if held_out_N is None else evaluation_loader("train", places_N=held_out_N)
    if feed.name != "resident" or device.type == "cuda":  # where it also compiles for this number of images
        look_s += time_loading(test_loader)  # an evaluation waits for its images; a training has them made ahead
    forward: nn.Module = model
    if device.type == "cuda":
        began_s = time.monotonic()
        x_BCHW = next(loader.epoch(0))[0]  # augmented: a recipe's augmentation may have to be compiled, too
        synchronize(device)
        compile_s += time.monotonic() - began_s
        if recipe.compile != "off":
            refuse_eager()
            forward = cast(nn.Module, torch.compile(model, mode=COMPILE_MODES[recipe.compile], dynamic=False))
            compile_s += warm_up(forward, model, optimizers, recipe, x_BCHW)
    if ranks.rank:
        torch.manual_seed(job.seed + (ranks.rank << 32))  # its dropout and mixup are its own
    return Setup(
        choice.name if choice else job.recipe,
        recipe,
        choice,
        rates,
        dataset,
        ranks,
        device,
        feed,
        loader,
        test_loader,
        held_out_loader,
        model,
        forward,
        optimizers,
        torch.amp.GradScaler(device.type, enabled=recipe.dtype == "float16"),
        compile_s,
        look_s,
        # A GPU runs ahead of the program; asking it for a number makes it wait, and once an epoch is enough.
        wait_every=1 if device.type == "cpu" else len(loader),
    )


def open_dataset(job: Job, display: Display) -> Dataset:
    """The data set asked for, or the fallback if it is nowhere and one was named; says what is unusual about it."""
    try:
        dataset = source.load(job.dataset, job.data, progress=display.work)
    except DataMissing as error:
        if job.fallback_dataset is None:
            raise
        display.say(f"! {error.message}\n! training on {job.fallback_dataset} instead, as --fallback-dataset says")
        dataset = source.load(job.fallback_dataset, None, progress=display.work)
    display.close()
    if dataset.warning:
        display.say(f"! {dataset.warning}")
    return dataset


def hold_out(dataset: Dataset, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(places of the other training images, of `count` of them). Raises UsageError: that is all.

    Each of ten seeds holds out others of 50,000, so that the luck of 5,000 (a deviation of 0.3 points at 95 %) goes
    away in their mean.
    """
    images = len(dataset.train)
    if images <= count:
        raise UsageError(
            f"--target, --patience and --validate hold out {count} training images, {dataset.name} has {images}.",
            "the same command without them",
        )
    order_N = torch.from_numpy(np.random.default_rng(0).permutation(images)).roll(-count * (seed % (images // count)))
    return order_N[count:].sort().values, order_N[:count].sort().values


def refuse_eager() -> None:
    """Make an error of it when torch.compile has had enough of a network's code: it would train eagerly from then on.

    That is at the ninth version, and models of several recipes in one process share them (LOG.md, 2026-11-21).
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # type: ignore[attr-defined]


def warm_up(
    forward: nn.Module, model: nn.Module, optimizers: list[Optimizer], recipe: Recipe, x_BCHW: torch.Tensor
) -> float:
    """Run every shape and kind of step once, forward and backward, to compile them; returns the seconds it took."""
    began_s = time.monotonic()
    model.train()
    with untouched(model, optimizers):
        for progress in turning_points(recipe, optimizers):
            set_learning_rates(optimizers, progress, recipe.optim)  # by which weights stop learning
            with torch.autocast(x_BCHW.device.type, x_BCHW.dtype, enabled=x_BCHW.dtype != torch.float32):
                logits_BK = forward(resize(x_BCHW, stage_at(recipe.stages, progress).image_px))
            logits_BK.float().sum().backward()
    model.zero_grad(set_to_none=True)
    synchronize(x_BCHW.device)
    return time.monotonic() - began_s


def time_loading(loader: Loader) -> float:
    """Seconds that an evaluation waits for one image of a loader that is not resident: the second time it is used."""
    ids_M = torch.arange(min(EVALUATION_BATCH, len(loader.labels_N)))
    for _ in range(2):
        began_s = time.monotonic()
        loader.take(ids_M)
    return (time.monotonic() - began_s) / len(ids_M)


def time_a_look(model: nn.Module, loader: Loader, image_px: int) -> float:
    """Seconds that the model takes to classify one image: the second of two batches, which finds memory ready."""
    model.eval()
    # On a GPU as many as an evaluation's batch, for which cuDNN then knows its algorithms.
    images = EVALUATION_BATCH if loader.device.type == "cuda" else 500
    x_BCHW = resize(loader.take(torch.arange(min(images, len(loader.labels_N)))), image_px)
    for _ in range(2):
        began_s = time.monotonic()
        predict(model, x_BCHW)
        synchronize(loader.device)
    return (time.monotonic() - began_s) / len(x_BCHW)
