"""Where matrix products beat oneDNN's convolution on this CPU: what `fastcifar/models/conv.py` goes by.

python bench/small_maps.py [--out FILE]

Prints, for 500 images in bfloat16, milliseconds of the forward pass and of both gradients together, median of 5, the
two in turn, after comparing their results.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from fastcifar.process import set_threads, tune_allocator
from fastcifar_kernels import conv_matmul

IMAGES, ROUNDS = 500, 5
CHANNELS = (128, 128), (256, 256), (512, 512), (256, 1024), (512, 2048)  # in, and filters
PIXELS = 1, 2, 3, 4, 5, 6, 8, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write one JSON line for each shape")
    out = parser.parse_args().out
    tune_allocator()
    set_threads()
    print(f"{'channels':>12} {'pixels':>7} {'oneDNN ms':>16} {'products ms':>16} {'gain':>6}")
    rows = []
    for c, o in CHANNELS:
        for px in PIXELS:
            rows.append(measure(c, o, px))
            times = (" ".join(f"{ms:7.1f}" for ms in rows[-1][name]) for name in ("onednn_ms", "matmul_ms"))
            print(
                f"{c:5} ->{o:5} {px:3} x{px:2} {next(times):>16} {next(times):>16} {rows[-1]['gain']:6.2f}", flush=True
            )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"images": IMAGES, "dtype": "bfloat16", "torch": torch.__version__, "threads": torch.get_num_threads()}
        out.write_text("".join(json.dumps(row | facts) + "\n" for row in rows))


def measure(c: int, o: int, px: int) -> dict:
    torch.manual_seed(0)
    x_NCHW, w_OCHW, grad_NOHW = (
        tensor.bfloat16().contiguous(memory_format=torch.channels_last)
        for tensor in (torch.randn(IMAGES, c, px, px), torch.randn(o, c, 3, 3), torch.randn(IMAGES, o, px, px))
    )
    ways = {"onednn_ms": lambda x, w: F.conv2d(x, w, padding=1), "matmul_ms": conv_matmul}
    times_s: dict[str, list] = {name: [] for name in ways}
    results: dict[str, tuple] = {}
    for _ in range(1 + ROUNDS):
        for name, way in ways.items():
            leaves = [tensor.detach().requires_grad_() for tensor in (x_NCHW, w_OCHW)]
            began_s = time.perf_counter()
            out_NOHW = way(*leaves)
            middle_s = time.perf_counter()
            grads = torch.autograd.grad(out_NOHW, leaves, grad_NOHW)
            times_s[name].append((middle_s - began_s, time.perf_counter() - middle_s))
            results[name] = out_NOHW, *grads
    for onednn, products in zip(*results.values(), strict=True):
        assert (onednn - products).float().norm() < 0.01 * onednn.float().norm(), "they differ"
    medians = {
        name: [statistics.median(of) * 1e3 for of in zip(*some[1:], strict=True)] for name, some in times_s.items()
    }
    gain = sum(medians["onednn_ms"]) / sum(medians["matmul_ms"])
    return {"channels_in": c, "filters": o, "px": px, **medians, "gain": gain}


if __name__ == "__main__":
    main()
