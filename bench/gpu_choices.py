"""What only a GPU can decide: images/s of recipe `speed` with each way to compile it, and with our BatchNorm and GELU.

    python bench/gpu_choices.py --out choices.json

Every choice trains on the same batches, in turn, after the compiler has forgotten the one before.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from gpu_dynamic import IMAGE_PX, compare

from fastcifar.display import Display
from fastcifar.job import Job
from fastcifar.process import set_threads, tune_allocator
from fastcifar.recipes import SPEED
from fastcifar.run import write_json
from fastcifar.settings import Recipe, SpeedNetModel, Stage
from fastcifar.setup import Setup, set_up

CHOICES = {
    "eager": replace(SPEED, compile="off"),
    "compiled": SPEED,
    "max-autotune": replace(SPEED, compile="max-autotune"),
    "compiled, own BatchNorm and GELU": replace(SPEED, model=SpeedNetModel(fused_gelu=True)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    tune_allocator()
    set_threads()
    where = {"dataset": chosen.dataset, "data": chosen.data, "device": chosen.device}
    ways: dict[str, Callable[[], Setup]] = {name: partial(make, recipe, where) for name, recipe in CHOICES.items()}
    failed: dict[str, str] = {}
    images_per_s = compare(ways, "speed", failed)
    write_json(chosen.out, {"image_px": IMAGE_PX, "images_per_s": images_per_s, "failed": failed})
    raise SystemExit(bool(failed))


def make(recipe: Recipe, where: dict) -> Setup:
    torch.compiler.reset()
    at_one_size = replace(recipe, stages=(Stage(image_px=IMAGE_PX, until=1.0),))
    return set_up(Job("speed", at_one_size, **where, steps=1), Display())


if __name__ == "__main__":
    main()
