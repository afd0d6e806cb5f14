"""The three ways to a 3x3 convolution on this CPU, by shape: what `fastcifar/models/conv.py` goes by.

python bench/convolutions.py [--dtype float32] [--out FILE]
python bench/convolutions.py --recipes cnn2 dynamic11 [--out FILE]

Prints, for 512 images, milliseconds of the forward pass and of both gradients together, median of 3, the three in turn,
after comparing their results. With `--recipes`, of a training step of these at 32 pixels, with blocks and without.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from fastcifar.models import conv
from fastcifar.models.build import build_model
from fastcifar.models.conv import conv_in_blocks
from fastcifar.optim.schedule import build_optimizers
from fastcifar.process import set_threads, tune_allocator
from fastcifar.recipes import find_recipe
from fastcifar.run import source_commit, write_atomically
from fastcifar_kernels import amx, conv_matmul, vectors

IMAGES, ROUNDS = 512, 3
CHANNELS = (32, 64), (64, 64), (64, 128), (64, 512), (128, 128), (256, 256), (256, 1024), (512, 512)  # in, and filters
PIXELS = 1, 2, 3, 4, 5, 8, 16, 32
MOST = 64 * 512 * 32 * 32  # of channels times filters times pixels: 0.6 TFLOP a step, forward and backward 2
WAYS = {"onednn": lambda x, w: F.conv2d(x, w, padding=1), "products": conv_matmul, "blocks": conv_in_blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--recipes", nargs="+", default=(), metavar="NAME", help="a step of these, not single shapes")
    parser.add_argument("--out", type=Path, help="also write one JSON line for each shape or recipe")
    arguments = parser.parse_args()
    tune_allocator()
    set_threads()
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "commit": source_commit()}
    facts |= {"amx": amx.available(), "lanes": list(vectors.LANES.values())}
    rows = recipes(arguments.recipes) if arguments.recipes else shapes(arguments.dtype)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.out, "".join(json.dumps(row | facts) + "\n" for row in rows).encode())


def shapes(dtype: str) -> list[dict]:
    print(" " * 22 + "".join(f"{name + ' ms':>17}" for name in WAYS))
    rows = []
    for c, o in CHANNELS:
        for px in PIXELS:
            if c * o * px * px > MOST:
                continue
            times_ms = measure(c, o, px, getattr(torch, dtype))
            rows.append({"images": IMAGES, "dtype": dtype, "channels_in": c, "filters": o, "px": px} | times_ms)
            times = "".join(f"{'':3}{' '.join(f'{ms:6.1f}' for ms in times_ms[name])} " for name in WAYS)
            fastest = min(WAYS, key=lambda name: sum(times_ms[name]))
            print(f"{c:5} ->{o:5} {px:3} x{px:2} {times}  {fastest}", flush=True)
    return rows


def measure(c: int, o: int, px: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Median milliseconds by way: forward, and backward."""
    torch.manual_seed(0)
    x_NCHW, w_OCHW, grad_NOHW = (
        tensor.to(dtype).contiguous(memory_format=torch.channels_last)
        for tensor in (torch.randn(IMAGES, c, px, px), torch.randn(o, c, 3, 3), torch.randn(IMAGES, o, px, px))
    )
    times_ms: dict[str, list] = {name: [] for name in WAYS}
    results: dict[str, tuple] = {}
    for _ in range(1 + ROUNDS):
        for name, way in WAYS.items():
            leaves = [tensor.detach().requires_grad_() for tensor in (x_NCHW, w_OCHW)]
            began_s = time.perf_counter()
            out_NOHW = way(*leaves)
            middle_s = time.perf_counter()
            grads = torch.autograd.grad(out_NOHW, leaves, grad_NOHW)
            times_ms[name].append((1e3 * (middle_s - began_s), 1e3 * (time.perf_counter() - middle_s)))
            results[name] = out_NOHW, *grads
    for theirs, *ours in zip(*results.values(), strict=True):
        for own in ours:
            assert (theirs - own).float().norm() < 0.03 * theirs.float().norm(), "they differ"
    return {name: [statistics.median(of) for of in zip(*some[1:], strict=True)] for name, some in times_ms.items()}


def recipes(names: list[str]) -> list[dict]:
    """Median milliseconds of a step of each: with convolutions in blocks, and without."""
    few = conv.FEW_PIXELS
    rows = []
    for name in names:
        recipe = find_recipe(name)
        model = build_model(recipe, 10, seed=0).train()
        optimizers = build_optimizers(model, recipe.optim, recipe.batch_size)
        dtype = getattr(torch, recipe.dtype)
        x_BCHW = torch.randn(recipe.batch_size, 3, 32, 32).to(dtype, memory_format=torch.channels_last)
        y_B = torch.randint(10, (recipe.batch_size,))
        times_ms = {"with_ms": [], "without_ms": []}
        for _ in range(1 + ROUNDS):
            for way, pixels in (("with_ms", few), ("without_ms", 32 * 32)):
                conv.FEW_PIXELS = pixels
                began_s = time.perf_counter()
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    logits_BK = model(x_BCHW).float()
                F.cross_entropy(logits_BK, y_B).backward()
                for optimizer in optimizers:
                    optimizer.step()
                model.zero_grad(set_to_none=True)
                times_ms[way].append(1e3 * (time.perf_counter() - began_s))
        row = {way: statistics.median(times[1:]) for way, times in times_ms.items()}
        rows.append({"recipe": name, "batch_size": recipe.batch_size, "dtype": recipe.dtype} | row)
        print(f"{name:12} {row['with_ms']:8.1f} ms, without blocks {row['without_ms']:8.1f}", flush=True)
    conv.FEW_PIXELS = few
    return rows


if __name__ == "__main__":
    main()
