"""The recipes of dynamic convolutions three ways, in turn: eager PyTorch, compiled PyTorch, and with our operators.

    python bench/gpu_dynamic.py --out dynamic.json

Steps at 32 pixels as `fastcifar bench train` times them. The first two take the operators' plain references
(`bn_relu_weighted_sum_reference`, `weighted_sum_reference`), uncompiled and under torch.compile; the third is the
recipe as it is, compiled around the Triton kernels of a GPU or the loops of a CPU.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcifar.benchmarks.train import ROUNDS, Course, describe
from fastcifar.display import Display
from fastcifar.job import Job
from fastcifar.models.dynamic import DynamicConv2d
from fastcifar.process import set_threads, tune_allocator
from fastcifar.recipes import find_recipe
from fastcifar.run import write_json
from fastcifar.settings import Stage
from fastcifar.setup import Setup, refuse_eager, set_up
from fastcifar_kernels.bn_relu_weighted_sum import bn_relu_weighted_sum_reference
from fastcifar_kernels.weighted_sum import weighted_sum_reference

RECIPES, IMAGE_PX = ("dynamic4", "dynamic11"), 32


class Plain(DynamicConv2d):
    """The same block on the references."""

    def normalise_and_sum(
        self, norm: nn.BatchNorm2d, y_NCHW: Tensor, coef_NK: Tensor, residual_NOHW: Tensor | None
    ) -> Tensor:
        names = "weight", "bias", "running_mean", "running_var"
        return bn_relu_weighted_sum_reference(
            y_NCHW.unflatten(1, self.split),
            coef_NK,
            *(getattr(norm, name).view(self.split) for name in names),
            residual_NCHW=residual_NOHW,
            training=norm.training,
            momentum=norm.momentum or 0.0,
            eps=norm.eps,
        )

    def combine(self, form, x_NCHW: Tensor, coef_NK: Tensor, residual_NOHW: Tensor | None) -> Tensor:
        assert form == "outputs", "the recipes' form; the others have no plain twin here"
        return weighted_sum_reference(self.conv(x_NCHW).unflatten(1, self.split), coef_NK, residual_NOHW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    tune_allocator()
    set_threads()
    refuse_eager()
    report: dict = {"image_px": IMAGE_PX, "recipes": {}, "failed": {}}
    for name in RECIPES:
        torch.compiler.reset()
        # One size, or whichever is compiled second would have its image size left open.
        recipe = replace(find_recipe(name), stages=(Stage(image_px=IMAGE_PX, until=1.0),))
        job = Job(name, recipe, dataset=chosen.dataset, data=chosen.data, device=chosen.device, steps=1)
        report["recipes"][name] = measure(job, report["failed"])
        write_json(chosen.out, report)
    raise SystemExit(bool(report["failed"]))


def measure(job: Job, failed: dict[str, str]) -> dict[str, float]:
    """Median images a second of each way; what goes wrong is named in `failed`."""
    ways = {
        "eager": lambda: plain(job, compiled=False),
        "compiled": lambda: plain(job, compiled=True),
        "kernels": lambda: set_up(job, Display()),
    }
    return compare(ways, job.recipe, failed)


def compare(ways: dict[str, Callable[[], Setup]], title: str, failed: dict[str, str]) -> dict[str, float]:
    """Median images a second of each of several setups, in turn."""
    courses: dict[str, Course] = {}
    for way, make in ways.items():
        try:
            course = Course(make(), IMAGE_PX)
            course.time_steps(2)  # which compile
            courses[way] = course
        except Exception as error:  # a kernel or compiler may fail in any way, and the other ways still be fine
            failed[f"{title}, {way}"] = describe(error)
    for _ in range(ROUNDS[next(iter(courses.values())).setup.device.type] if courses else 0):
        for course in courses.values():
            course.sample()
    return {way: statistics.median(course.rates) for way, course in courses.items()}


def plain(job: Job, compiled: bool) -> Setup:
    """Ready to train on the references, without an operator of ours between convolution and sum."""
    recipe = replace(job.settings, compile="off")
    setup = set_up(replace(job, settings=recipe), Display())
    for part in setup.model.modules():
        if type(part) is DynamicConv2d:
            part.__class__ = Plain
    return replace(setup, forward=torch.compile(setup.model) if compiled else setup.model)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
