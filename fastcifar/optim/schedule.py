"""Which parameters learn how, and how fast at each point of the training.

The learning rate is a function of progress (0 at the start, 1 at the end), not of a step count, so that one schedule
serves a run of fixed length and one that fits itself into a budget.
"""

from torch.optim import SGD, Optimizer

from fastcifar.models.speednet import SpeedNet
from fastcifar.optim.muon import Muon
from fastcifar.recipes import Optim


def one_cycle(progress: float, warmup: float, until: float = 1.0) -> float:
    """Share of the peak learning rate: a straight line up until `warmup`, then one down to 0 at `until`."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (until - progress) / (until - warmup))


def build_optimizers(model: SpeedNet, optim: Optim, batch_size: int) -> list[Optimizer]:
    """Muon for the filters; SGD for whitening bias, BatchNorm biases and head.

    Each parameter group carries `lr_peak` and `until`, the progress at which it stops learning. The loss is a sum over
    the batch, and so is the weight decay.
    """
    filters = [weight for weight in model.groups.parameters() if weight.ndim == 4]
    biases = [weight for weight in model.groups.parameters() if weight.ndim == 1 and weight.requires_grad]

    def sgd_group(params: list, lr: float, until: float = 1.0) -> dict:
        return {"params": params, "lr": lr, "weight_decay": optim.weight_decay * batch_size / lr, "until": until}

    assert model.whiten.bias is not None
    sgd = SGD(
        [
            sgd_group([model.whiten.bias], optim.bias_lr, optim.whiten_bias_until),
            sgd_group(biases, optim.bias_lr),
            sgd_group([model.head.weight], optim.head_lr),
        ],
        momentum=optim.momentum,
        nesterov=True,
        fused=True,
    )
    muon = Muon(filters, optim.muon_lr, optim.muon_momentum, optim.muon_steps)
    for group in sgd.param_groups + muon.param_groups:
        group.setdefault("until", 1.0)
        group["lr_peak"] = group["lr"]
    return [muon, sgd]


def set_learning_rates(optimizers: list[Optimizer], progress: float, warmup: float) -> float:
    """Bring every group to its place on the schedule; returns the share of the peak, between 0 and 1.

    A group that has stopped learning asks for no gradient any more: without the whitening bias, the backward pass ends
    one convolution earlier.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["lr_peak"] * one_cycle(progress, warmup, group["until"])
            if progress >= group["until"]:
                for weight in group["params"]:
                    weight.requires_grad_(False)
    return one_cycle(progress, warmup)
