"""What a training must remember to go on, after a stop, as if nothing had happened."""

from collections import defaultdict

import torch
from torch import Tensor

from fastcifar.budget import Pace, Position
from fastcifar.looks import Looks
from fastcifar.run import Checkpoint
from fastcifar.setup import Setup


def capture(setup: Setup, pace: Pace, position: Position, spent_s: float, looks: Looks) -> Checkpoint:
    """The training as it stands, for `RunFolder.write_checkpoint`."""
    tensors = {f"model.{name}": value for name, value in setup.model.state_dict().items()}
    tensors["random.cpu"] = torch.get_rng_state()  # what dropout draws from
    if setup.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(setup.device)
    for number, optimizer in enumerate(setup.optimizers):
        for weight, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{weight}.{name}": value for name, value in state.items()}
    tensors |= {f"best.{name}": value for name, value in looks.best_state.items()}
    facts = looks.facts(), setup.scaler.state_dict()
    return Checkpoint(tensors, position.step, spent_s, position.train_s, pace.knots, *facts)


def restore(setup: Setup, pace: Pace, checkpoint: Checkpoint, looks: Looks) -> Position:
    """Bring model, optimizers, random numbers, pace and looks to where `capture` saw them."""

    def named(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in checkpoint.tensors.items() if name.startswith(prefix)}

    setup.model.load_state_dict(named("model."))
    for number, optimizer in enumerate(setup.optimizers):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        state = defaultdict(dict)
        for name, tensor in named(f"optimizer.{number}.").items():
            place, part = name.split(".")
            weight = weights[int(place)]
            if tensor.shape == weight.shape:  # torch's fused optimizers read both as they lie in memory
                tensor = torch.empty_like(weight, dtype=tensor.dtype).copy_(tensor)
            state[int(place)][part] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    if checkpoint.scaler:
        setup.scaler.load_state_dict(checkpoint.scaler)
    if setup.ranks.rank:  # the checkpoint has the random numbers of rank 0
        torch.manual_seed((torch.initial_seed() + (checkpoint.step << 40)) % 2**63)
    else:
        torch.set_rng_state(checkpoint.tensors["random.cpu"])
        if "random.cuda" in checkpoint.tensors and setup.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.tensors["random.cuda"], setup.device)
    pace.knots = list(checkpoint.knots)
    looks.best_state = named("best.")
    for name, fact in checkpoint.looks.items():
        setattr(looks, name, fact)
    return Position(checkpoint.step, checkpoint.train_s)
