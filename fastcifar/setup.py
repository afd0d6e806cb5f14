"""Everything a training needs before its first step: data, loaders, model, optimizers, warmed up.

Shapes: N images, B of a batch, C channels, H rows, W columns.
"""

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fastcifar.budget import guess_cost
from fastcifar.data import source
from fastcifar.data.dataset import Dataset
from fastcifar.devices import pick_device, synchronize
from fastcifar.display import Display
from fastcifar.errors import DataMissing, UsageError
from fastcifar.evaluate import predict
from fastcifar.job import HELD_OUT, Job
from fastcifar.loaders.feed import Feed, open_feed, pick_feed
from fastcifar.loaders.loader import Loader
from fastcifar.models.cnn import build_cnn
from fastcifar.models.dynamicnet import build_dynamicnet
from fastcifar.models.mlp import build_mlp
from fastcifar.models.resnet import build_resnet34
from fastcifar.models.speednet import SpeedNet
from fastcifar.optim.schedule import build_optimizers
from fastcifar.process import physical_cores
from fastcifar.settings import CnnModel, DynamicModel, MlpModel, Recipe, ResNet34Model, SpeedNetModel
from fastcifar_kernels import amx

EVALUATION_BATCH = 1000
SMALLEST_BATCH = 128  # below it the fixed costs of a step, 25 ms for Muon alone, are most of it
LOOKS_A_STEP = 4  # training on an image takes as long as classifying four (0.9 and 0.22 ms on 2 cores)
TRAINING_SHARE = 0.75  # of a short budget; the rest is imports, data and evaluation
WHITENING_IMAGES = 5000  # enough to estimate a 12 x 12 covariance


@dataclass(frozen=True)
class Setup:
    """What `set_up` made. `forward` is the model, compiled where that pays; both share their weights."""

    recipe: Recipe  # the job's, its batch size fitted to the budget
    dataset: Dataset
    device: torch.device
    feed: Feed
    loader: Loader
    test_loader: Loader
    held_out_loader: Loader | None
    model: nn.Module
    forward: nn.Module
    optimizers: list[Optimizer]
    compile_s: float
    look_s: float  # to evaluate one image once
    wait_every: int  # most steps between two times that the program waits for the device


def set_up(job: Job, display: Display) -> Setup:
    """Raises DataError, DeviceError, UsageError."""
    recipe = job.settings
    device, dtype = pick_device(job.device), getattr(torch, recipe.dtype)
    if recipe.dtype == "float16" and device.type == "cpu":
        raise UsageError("--dtype: float16 is a thousand times slower than bfloat16 on a CPU.", "--dtype bfloat16")
    torch.backends.cudnn.benchmark = True  # image sizes are few and fixed, so cuDNN may try its algorithms once each
    dataset = open_dataset(job, display)
    train_N, held_out_N = hold_out(dataset, HELD_OUT) if job.holds_out else (None, None)
    images = len(dataset.train) if train_N is None else len(train_N)
    if recipe.batch_size > images:
        raise UsageError(
            f"--batch_size: {recipe.batch_size} is more than the {images} training images of {dataset.name}.",
            f"--batch_size {images}",
        )

    def open_named(name: str) -> Feed:
        where = {"data": job.data, "progress": display.work}
        return open_feed(name, dataset, workers=job.workers or physical_cores(), device=device, dtype=dtype, **where)

    def train_loader(feed: Feed) -> Loader:
        options = {"shuffle": True, "seed": job.seed, "augment": recipe.augment, "places_N": train_N}
        return feed.loader("train", batch_size=recipe.batch_size, **options)

    feed = open_named("resident" if job.loader == "auto" else job.loader)
    display.close()
    loader = train_loader(feed)
    began_s = time.monotonic()
    x_NCHW = loader.take(torch.arange(min(WHITENING_IMAGES, images)))
    compile_s = time.monotonic() - began_s  # nearly all of it: the images themselves take 10 ms
    model = build_model(recipe, len(dataset.class_names), job.seed).to(device)
    if isinstance(model, SpeedNet) and isinstance(recipe.model, SpeedNetModel):
        model.fit_whitening(x_NCHW, recipe.model.whiten_eps)
    if isinstance(model, SpeedNet):
        x_NCHW = x_NCHW[: amx.GROUP]
        if model.blocks_pay(x_NCHW):
            compile_s += warm_up(model, model, recipe, x_NCHW)
    look_s = time_a_look(model, loader)
    if job.loader == "auto":
        feed, loader, why = pick_feed(1 / (look_s * LOOKS_A_STEP), open_named, train_loader)
        display.say(why)
    evaluation_loader = partial(feed.loader, batch_size=EVALUATION_BATCH)
    test_loader = evaluation_loader("test")
    held_out_loader = None if held_out_N is None else evaluation_loader("train", places_N=held_out_N)
    if job.budget_s:
        recipe = replace(recipe, batch_size=fit_batch_size(recipe, job.budget_s, look_s))
        loader.batch_size = recipe.batch_size
    if feed.name != "resident" or device.type == "cuda":  # where it also compiles for this number of images
        look_s += time_loading(test_loader)  # an evaluation waits for its images; a training has them made ahead
    forward: nn.Module = model
    if recipe.compile and device.type == "cuda":
        forward = cast(nn.Module, torch.compile(model))
        compile_s += warm_up(forward, model, recipe, loader.take(torch.arange(recipe.batch_size)))
    return Setup(
        recipe,
        dataset,
        device,
        feed,
        loader,
        test_loader,
        held_out_loader,
        model,
        forward,
        build_optimizers(model, recipe.optim, recipe.batch_size),
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


def hold_out(dataset: Dataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(places of the other training images, of `count` of them, always the same). Raises UsageError: that is all."""
    images = len(dataset.train)
    if images <= count:
        raise UsageError(
            f"--target, --patience and --validate hold out {count} training images, {dataset.name} has {images}.",
            "--epochs 10",
        )
    order_N = torch.from_numpy(np.random.default_rng(0).permutation(images))
    return order_N[count:].sort().values, order_N[:count].sort().values


def build_model(recipe: Recipe, classes: int, seed: int) -> nn.Module:
    """The recipe's model with fresh weights, channels-last, on the CPU."""
    torch.manual_seed(seed)
    match recipe.model:
        case MlpModel():
            model = build_mlp(classes, **asdict(recipe.model))
        case CnnModel():
            model = build_cnn(classes, **asdict(recipe.model))
        case DynamicModel():
            model = build_dynamicnet(classes, **asdict(recipe.model))
        case ResNet34Model():
            model = build_resnet34(classes, recipe.model.weights)
        case _:
            model = SpeedNet(classes, recipe.model.widths, recipe.model.own_kernels)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fit_batch_size(recipe: Recipe, budget_s: float, look_s: float) -> int:
    """The recipe's batch size, or a half, quarter ... of it where the budget would otherwise buy too few steps."""
    rest = guess_cost(recipe.stages[-1].image_px)
    begins = (0.0, *(stage.until for stage in recipe.stages))
    size = sum((s.until - b) * guess_cost(s.image_px) / rest for s, b in zip(recipe.stages, begins, strict=False))
    images = TRAINING_SHARE * budget_s / (look_s * LOOKS_A_STEP * size)
    batch_size = recipe.batch_size
    while images / batch_size < recipe.min_steps and batch_size >= 2 * SMALLEST_BATCH:
        batch_size //= 2
    return batch_size


def warm_up(forward: nn.Module, model: nn.Module, recipe: Recipe, x_BCHW: torch.Tensor) -> float:
    """Run every shape and kind of step once, forward and backward, to compile them; returns the seconds it took.

    Weights, statistics and gradients are left as they were.
    """
    began_s = time.monotonic()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whiten_bias = model.whiten.bias if isinstance(model, SpeedNet) else None
    for learns in (True,) if whiten_bias is None else (False, True):
        if whiten_bias is not None:
            whiten_bias.requires_grad_(learns)
        for image_px in {stage.image_px for stage in recipe.stages}:
            with torch.autocast(x_BCHW.device.type, x_BCHW.dtype, enabled=x_BCHW.dtype != torch.float32):
                logits_BK = forward(resize(x_BCHW, image_px))
            logits_BK.float().sum().backward()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    synchronize(x_BCHW.device)
    return time.monotonic() - began_s


def time_loading(loader: Loader) -> float:
    """Seconds that an evaluation waits for one image of a loader that is not resident: the second time it is used."""
    ids_M = torch.arange(min(EVALUATION_BATCH, len(loader.labels_N)))
    for _ in range(2):
        began_s = time.monotonic()
        loader.take(ids_M)
    return (time.monotonic() - began_s) / len(ids_M)


def time_a_look(model: nn.Module, loader: Loader) -> float:
    """Seconds that the model takes to classify one image: the second of two batches, which finds memory ready."""
    model.eval()
    x_BCHW = loader.take(torch.arange(min(500, len(loader.labels_N))))
    for _ in range(2):
        began_s = time.monotonic()
        predict(model, x_BCHW)
        synchronize(loader.device)
    return (time.monotonic() - began_s) / len(x_BCHW)


def resize(x_BCHW: torch.Tensor, image_px: int) -> torch.Tensor:
    """The images at another size, antialiased; float32 inside, which the CPU's bilinear filter needs."""
    if x_BCHW.size(3) == image_px:
        return x_BCHW
    small = F.interpolate(x_BCHW.float(), size=image_px, mode="bilinear", antialias=True)
    return small.to(x_BCHW.dtype, memory_format=torch.channels_last)
