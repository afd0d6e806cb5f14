"""`speed` on a CPU beside PyTorch's own operators: each convolution with its pooling, and the whole step.

    python bench/blocked.py [--dtype float32] [--out FILE]

1,024 images. The two run in turn after their results were compared; milliseconds are medians of ROUNDS. The
instructions are the best that the processor has, or that $ONEDNN_MAX_CPU_ISA allows. With --out, one JSON line a row.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar.benchmarks.loaders import versions
from fastcifar.doctor import cpu_capability
from fastcifar.models.build import build_model
from fastcifar.models.speednet import SpeedNet
from fastcifar.optim.schedule import build_optimizers
from fastcifar.process import physical_cores, processor, set_threads, tune_allocator
from fastcifar.recipes import find_recipe
from fastcifar.run import source_commit
from fastcifar.settings import SpeedNetModel
from fastcifar_kernels import conv_blocked
from fastcifar_kernels.conv_blocked import blocks_run
from fastcifar_kernels.layout import GROUP

IMAGES, ROUNDS = 1024, 9
SIZES = 20, 24, 32
CONVOLUTIONS = (  # channels in, filters, how often the map has been halved, pooled
    (32, 64, 0, True),
    (64, 64, 1, False),
    (64, 256, 1, True),
    (256, 256, 2, False),
    (256, 256, 2, True),
    (256, 256, 3, False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path)
    how = parser.parse_args()
    dtype, out = getattr(torch, how.dtype), how.out
    if not blocks_run(torch.empty(0, dtype=dtype)):
        parser.exit(1, f"blocked.py: no convolutions of ours in {how.dtype} on this CPU (fastcifar doctor).\n")
    tune_allocator()
    set_threads()
    rows = []
    for image_px in SIZES:
        for c, o, halved, pool in CONVOLUTIONS:
            rows.append(
                {"what": "convolution", "image_px": image_px} | convolution(c, o, (image_px - 1) >> halved, pool, dtype)
            )
            print(json.dumps(rows[-1]), flush=True)
        for bias_learns in (True, False):
            rows.append(
                {"what": "step", "image_px": image_px, "bias_learns": bias_learns} | step(image_px, bias_learns, dtype)
            )
            print(json.dumps(rows[-1]), flush=True)
    about = {"dtype": how.dtype, "instructions": cpu_capability()}
    about |= {"machine": f"{processor()}, {physical_cores()} cores", "versions": versions(), "commit": source_commit()}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(row | about) + "\n" for row in rows))


def convolution(c: int, o: int, px: int, pool: bool, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    x_GHWMC = torch.randn(IMAGES // GROUP, px, px, GROUP, c).to(dtype)
    w_OCHW = torch.randn(o, c, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last) / (9 * c) ** 0.5
    x_NCHW = plain(x_GHWMC)

    def torch_conv(x_NCHW: Tensor, w_OCHW: Tensor) -> Tensor:
        y_NCHW = F.conv2d(x_NCHW, w_OCHW, padding=1)
        return F.max_pool2d(y_NCHW, 2) if pool else y_NCHW

    y_GHWMO = conv_blocked(x_GHWMC, w_OCHW, pool)
    grad_GHWMO = torch.randn(y_GHWMO.shape).to(dtype)
    assert close(plain(y_GHWMO), torch_conv(x_NCHW, w_OCHW)), "they differ"

    def both(way: Callable, x: Tensor, grad: Tensor) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            leaves = [tensor.detach().requires_grad_() for tensor in (x, w_OCHW)]
            began_s = time.perf_counter()
            y = way(*leaves)
            middle_s = time.perf_counter()
            torch.autograd.grad(y, leaves, grad)
            return middle_s - began_s, time.perf_counter() - middle_s

        return run

    ours = both(lambda x, w: conv_blocked(x, w, pool), x_GHWMC, grad_GHWMO)
    times = in_turn(ours, both(torch_conv, x_NCHW, plain(grad_GHWMO)))
    names = ("own_forward_ms", "own_backward_ms"), ("torch_forward_ms", "torch_backward_ms")
    milliseconds = {
        name: ms for pair, some in zip(names, times, strict=True) for name, ms in zip(pair, some, strict=True)
    }
    return {"channels_in": c, "filters": o, "px": px, "pool": pool} | milliseconds


def step(image_px: int, bias_learns: bool, dtype: torch.dtype) -> dict:
    """A training step of recipe `speed`: forward, backward, optimizers."""
    torch.manual_seed(0)
    recipe = find_recipe("speed")
    x_NCHW = torch.randn(IMAGES, 3, image_px, image_px).to(dtype).contiguous(memory_format=torch.channels_last)
    y_N = torch.randint(0, 10, (IMAGES,))

    def stepper(own_kernels: bool) -> Callable[[], tuple[float]]:
        model = build_model(replace(recipe, model=SpeedNetModel(own_kernels=own_kernels)), 10, 0)
        assert isinstance(model, SpeedNet)
        assert model.whiten.bias is not None
        model.fit_whitening(x_NCHW, 5e-4)
        model.whiten.bias.requires_grad_(bias_learns)
        optimizers = build_optimizers(model, recipe.optim, IMAGES)

        def run() -> tuple[float]:
            began_s = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits_NK = model(x_NCHW)
            F.cross_entropy(logits_NK.float(), y_N, reduction="sum").backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            return (time.perf_counter() - began_s,)

        return run

    (own,), (torchs,) = in_turn(stepper(True), stepper(False))
    return {"own_ms": own, "torch_ms": torchs}


def plain(x_GHWMC: Tensor) -> Tensor:
    """As PyTorch's operators like it best: [N, C, H, W], channels-last."""
    return x_GHWMC.permute(0, 3, 4, 1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def close(one: Tensor, other: Tensor) -> bool:
    allowed = 0.02 if one.dtype == torch.bfloat16 else 1e-5
    return bool((one - other).float().norm() < allowed * other.float().norm())


def in_turn(*candidates: Callable[[], tuple[float, ...]]) -> list[list[float]]:
    """Medians in ms of each time that each of them returns, in seconds."""
    times_s: list[list] = [[] for _ in candidates]
    for _ in range(2 + ROUNDS):
        for candidate, some in zip(candidates, times_s, strict=True):
            some.append(candidate())
    return [[statistics.median(of) * 1e3 for of in zip(*some[2:], strict=True)] for some in times_s]


if __name__ == "__main__":
    main()
