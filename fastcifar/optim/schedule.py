"""Which parameters learn how, and how fast at each point of the training.

The learning rate is a function of progress (0 at the start, 1 at the end), not of a step count, so that one schedule
serves a run of fixed length and one that fits itself into a budget.
"""

import math

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastcifar.errors import UsageError
from fastcifar.models.dynamic import DynamicConv2d
from fastcifar.models.speednet import SpeedNet
from fastcifar.optim.muon import Muon
from fastcifar.settings import ClassicOptim, Optim, SpeedOptim


def one_cycle(progress: float, warmup: float, until: float = 1.0) -> float:
    """Share of the peak learning rate: a straight line up until `warmup`, then one down to 0 at `until`."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (until - progress) / (until - warmup))


def lr_share(optim: Optim, progress: float, until: float = 1.0) -> float:
    """Share of the peak learning rate, between 0 and 1, that the optimizer's schedule gives at this progress."""
    if isinstance(optim, SpeedOptim) or optim.schedule == "one-cycle":
        return one_cycle(progress, optim.warmup, until)
    if optim.schedule == "cosine":
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2
    if optim.schedule == "step":
        # A billionth more, so that the step that begins just there is not left behind by rounding.
        return 0.1 ** math.floor(progress / optim.step + 1e-9)
    return 1.0


def build_optimizers(model: nn.Module, optim: Optim, batch_size: int) -> list[Optimizer]:
    """Each parameter group carries `lr_peak` and `until`, the progress at which it stops learning.

    On a GPU its `lr` is a tensor there, which a CUDA graph reads anew at every step.

    Raises UsageError: muon for a model without convolutions.
    """
    optimizers = classic(model, optim) if isinstance(optim, ClassicOptim) else speed(model, optim, batch_size)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("until", 1.0)
            group["lr_peak"] = group["lr"]
            if group["params"][0].is_cuda:
                group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
                if "capturable" in group:
                    group["capturable"] = True
    return optimizers


def classic(model: nn.Module, optim: ClassicOptim) -> list[Optimizer]:
    """The one for all weights; with muon two, as it is for filters alone."""
    options = {"lr": optim.lr, "weight_decay": optim.weight_decay, "fused": True}
    if optim.name == "muon":
        groups = stacks(model)
        if not groups:
            raise UsageError(
                "--optim.name: muon is for the filters of convolutions, and this model has none.", "--optim.name adamw"
            )
        filters = {weight for group in groups for weight in group["params"]}
        rest = [weight for weight in model.parameters() if weight not in filters]
        return [Muon(groups, optim.muon_lr, optim.momentum), AdamW(rest, **options)]
    if optim.name == "sgd":
        return [SGD(model.parameters(), momentum=optim.momentum, nesterov=optim.nesterov, **options)]
    return [{"adam": Adam, "adamw": AdamW}[optim.name](model.parameters(), **options)]


def stacks(model: nn.Module) -> list[dict]:
    """The filters of all convolutions as parameter groups, each saying of how many experts it is a stack."""
    experts = {part.conv.weight: part.split[0] for part in model.modules() if isinstance(part, DynamicConv2d)}
    filters = [part.weight for part in model.modules() if isinstance(part, nn.Conv2d)]
    return [{"params": [weight], "experts": experts.get(weight, 1)} for weight in filters]


def speed(model: nn.Module, optim: SpeedOptim, batch_size: int) -> list[Optimizer]:
    """Muon for the filters; SGD for whitening bias, BatchNorm biases and head.

    The loss is a sum over the batch, and so is the weight decay.
    """
    nets = [part for part in model.modules() if isinstance(part, SpeedNet)]
    assert nets
    in_groups = [weight for net in nets for weight in net.groups.parameters()]
    filters = [weight for weight in in_groups if weight.ndim == 4]
    biases = [weight for weight in in_groups if weight.ndim == 1 and weight.requires_grad]

    def sgd_group(params: list, lr: float, until: float = 1.0) -> dict:
        return {"params": params, "lr": lr, "weight_decay": optim.weight_decay * batch_size / lr, "until": until}

    sgd = SGD(
        [
            sgd_group([net.whiten.bias for net in nets], optim.bias_lr, optim.whiten_bias_until),
            sgd_group(biases, optim.bias_lr),
            sgd_group([net.head.weight for net in nets], optim.head_lr),
        ],
        momentum=optim.momentum,
        nesterov=True,
        fused=True,
    )
    return [Muon(filters, optim.muon_lr, optim.muon_momentum, optim.muon_steps), sgd]


def set_learning_rates(optimizers: list[Optimizer], progress: float, optim: Optim) -> float:
    """Bring every group to its place on the schedule; returns the share of the peak, between 0 and 1.

    A group that has stopped learning asks for no gradient any more: without the whitening bias, the backward pass ends
    one convolution earlier.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = group["lr_peak"] * lr_share(optim, progress, group["until"])
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            if progress >= group["until"]:
                for weight in group["params"]:
                    weight.requires_grad_(False)
    return lr_share(optim, progress)
