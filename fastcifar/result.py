"""result.json: what a finished run says of itself."""

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import torch

from fastcifar.budget import Position
from fastcifar.devices import peak_memory_bytes
from fastcifar.evaluate import Evaluation
from fastcifar.job import Job
from fastcifar.setup import Setup


def describe_result(
    job: Job,
    setup: Setup,
    evaluation: Evaluation,
    position: Position,
    eval_s: float,
    val_acc: float | None,
    commit: str | None,
) -> dict:
    """Every key of result.json. `wall_s` is 0 until the moment before it is written.

    `train_s` is the clock that speedrun papers use (steps only), `wall_s` the user's (since the process started). The
    macro averages, like `test_acc_tta`, are of the answers with test-time augmentation. `val_acc` is that of
    the last look at held-out images, with --patience of the best, whose weights are kept; null if none were held out.
    """
    batch_size, dataset = setup.recipe.batch_size, setup.dataset
    return {
        "dataset": dataset.name,
        "data_verified": dataset.verified,
        "fallback_from": None if dataset.name == job.dataset else job.dataset,
        "recipe": setup.name,
        "as_reported": job.as_reported,
        "loader": setup.feed.name,
        "device": torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else "cpu",
        "processes": setup.ranks.count,
        "seed": job.seed,
        "budget_s": job.budget_s,
        "wall_s": 0.0,
        "compile_s": setup.compile_s + position.compile_s,
        "train_s": position.train_s,
        "eval_s": eval_s,
        "epochs": position.step / len(setup.loader),
        "steps": position.step,
        "images_per_s": position.step * batch_size / position.train_s,
        "val_acc": val_acc,
        **evaluation.summary(),
        "expected_acc_tta": asdict(setup.choice.expected) if setup.choice and setup.choice.expected else None,
        "params": sum(weight.numel() for weight in setup.model.parameters()),
        "peak_memory_bytes": peak_memory_bytes(setup.device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": commit,
    }


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
