"""How fast the kernels are, beside eager and compiled PyTorch and beside a plain copy of the same bytes.

A GPU times the Triton kernels, a CPU the numba loops. Every operator must first pass `verify` on the same shape, with
fewer samples. The candidates run in turn, so that a slow moment hits all alike; each forward and backward is timed by
itself, with a cold cache on a GPU. The bytes are those that the operator's docstring counts, and their share is that of
the bandwidth with which this device copies, measured in the same run.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from fastcifar_kernels import verify

# N, K, C, H, W
GPU_SHAPES = (
    # fastcifar's recipe `speed`: its images, and the maps of its three groups of convolutions.
    (2000, 1, 3, 32, 32),
    (2000, 1, 64, 15, 15),
    (2000, 1, 256, 7, 7),
    (2000, 1, 256, 3, 3),
    # Those of dynamic convolutions.
    (512, 4, 64, 32, 32),
    (512, 4, 128, 16, 16),
    (512, 4, 256, 16, 16),
    (512, 4, 256, 8, 8),
    (512, 4, 512, 8, 8),
)
CPU_SHAPES = ((128, 4, 64, 32, 32), (128, 4, 128, 16, 16), (128, 4, 512, 8, 8))
WITHOUT_EXPERTS = ("bn_relu_pool", "bn_gelu")
ROUNDS = {"cuda": 30, "cpu": 9}
WARM_UP = 3
GATE_SAMPLES = 8
COLD_BYTES = 512 * 2**20  # written between two timings: more than any GPU's L2 cache holds

# In units of one map, N * P * C elements, or of one set of filters: what the docstrings count.
UNITS: dict[str, Callable[[int, int], tuple[float, float]]] = {
    "weighted_sum": lambda n, k: (k + 1, 2 * k + 1),
    "scaled_copies": lambda n, k: (k + 1, k + 2),
    "batch_statistics": lambda n, k: (k, 0),
    "bn_relu_weighted_sum": lambda n, k: (2 * k + 1, 3 * k + 2),
    "aggregate_weights": lambda n, k: (k + n, 2 * k + n),
    "bn_relu_pool": lambda n, k: (3, 5),
    "bn_relu_pool, pool": lambda n, k: (2.25, 3.5),
    "bn_gelu": lambda n, k: (3, 6),
}
GPU_UNITS = {
    **UNITS,
    "bn_gelu": lambda n, k: (3, 5),  # its backward computes again what its loops store
    "crop_flip, reflect": lambda n, k: (3, 0),  # bytes to bfloat16; on a CPU it is plain torch
}


def rows(device: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Iterator[list[dict[str, Any]]]:
    """For each operator, shape and pass, one row for each candidate: kernel, eager and, if it can compile, compiled.

    Raises:
        ArithmeticError: an operator does not pass its verification; nothing is timed then.
    """
    copy_gb_per_s = copy_bandwidth(device)
    units = GPU_UNITS if device == "cuda" else UNITS
    for shape in shapes:
        gate(device, shape, dtype)
        for case in verify.cases(shape, device):
            name = ", ".join(filter(None, (case.op, case.variant)))
            if name not in units or not suits(case.op, shape):
                continue
            given = {name: tensor.to(dtype) if name in case.typed else tensor for name, tensor in case.tensors.items()}
            times_s, peaks = measure(case, given, device)
            for i, direction in enumerate(("forward", "backward")):
                if direction == "backward" and "grad" not in case.tensors:
                    continue
                size = units[name](*shape[:2])[i] * unit_bytes(case.op, given)
                yield [
                    {
                        "op": name,
                        "pass": direction,
                        "shape_NKCHW": list(shape),
                        "dtype": str(dtype)[6:],
                        "candidate": candidate,
                        **quantiles([both[i] for both in times]),
                        "bytes": size,
                        "copy_gb_per_s": copy_gb_per_s,
                        "peak_memory_bytes": peaks[candidate],
                    }
                    for candidate, times in times_s.items()
                ]


def suits(op: str, shape: tuple[int, ...]) -> bool:
    """Whether an operator is worth timing on [N, K, C, H, W]: images have 3 channels, and experts come in numbers."""
    _, k, c, _, _ = shape
    if op == "crop_flip" or c == 3:
        return op == "crop_flip" and c == 3
    return k > 1 or op in WITHOUT_EXPERTS


def gate(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ArithmeticError unless every operator computes what it should on this shape, with fewer samples."""
    for case in verify.cases((min(shape[0], GATE_SAMPLES), *shape[1:]), device):
        row = verify.judge(case, dtype)
        if not row.passed:
            raise ArithmeticError(
                f"{row.op} is wrong, so it is not timed: see python -m fastcifar_kernels.verify. {row}"
            )


def unit_bytes(op: str, given: dict[str, Tensor]) -> int:
    """The size of one map, of one set of filters, or of the bytes of a batch of images."""
    for name in ("x", "images"):
        if name in given:
            return given[name].nbytes
    stack = given["w"] if op == "aggregate_weights" else given["y"]
    return stack.nbytes // stack.size(0 if op == "aggregate_weights" else 1)


def quantiles(times_s: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    tenths = statistics.quantiles(times_s, n=10, method="inclusive")
    return {"median_s": statistics.median(times_s), "p20_s": tenths[1], "p80_s": tenths[7]}


# Timing


def measure(case: verify.Case, given: dict[str, Tensor], device: str) -> tuple[dict[str, list], dict[str, int | None]]:
    """Each candidate's seconds for (forward, backward) in every round, and its peak of memory beyond the arguments."""
    leaves = {
        name: t.requires_grad_()
        for name, t in given.items()
        if name not in ("grad", "running_mean", "running_var") and t.is_floating_point()
    }
    given = given | leaves
    torch.compiler.reset()
    compiled = torch.compile(lambda tensors: case.call("reference", tensors))
    candidates = {
        "kernel": lambda: case.call("kernel", given),
        "eager": lambda: case.call("reference", given),
        "compiled": lambda: compiled(given),
    }
    try:
        candidates["compiled"]()
    except BackendCompilerFailed:  # no C++ compiler on this machine
        del candidates["compiled"]
    times_s: dict[str, list] = {name: [] for name in candidates}
    peaks: dict[str, int | None] = dict.fromkeys(candidates)
    cold = torch.empty(COLD_BYTES if device == "cuda" else 0, dtype=torch.uint8, device=device)
    for round_ in range(WARM_UP + ROUNDS[device]):
        for name, call in candidates.items():
            cold.zero_()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            both_s = time_once(call, list(leaves.values()), given.get("grad"), device)
            if round_ >= WARM_UP:
                times_s[name].append(both_s)
                if device == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated() - before
    return times_s, peaks


def time_once(call: Callable, leaves: list[Tensor], grad: Tensor | None, device: str) -> tuple[float, float]:
    """Seconds of one forward and one backward."""
    clock = GpuClock() if device == "cuda" else CpuClock()
    clock.mark()
    out = call()[0]
    clock.mark()
    if grad is not None:
        torch.autograd.grad(out, leaves, grad.to(out.dtype))
    clock.mark()
    first_s, second_s = clock.intervals_s()
    return first_s, second_s


class CpuClock:
    def __init__(self) -> None:
        self.times_s: list[float] = []

    def mark(self) -> None:
        self.times_s.append(time.perf_counter())

    def intervals_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times_s, self.times_s[1:], strict=False)]


class GpuClock:
    """Events on the stream. The GPU is kept waiting first, until all is queued: launching is not what we time."""

    WAIT_CYCLES = 4_000_000  # about 2 ms

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda._sleep(self.WAIT_CYCLES)
        self.events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        self.events.append(torch.cuda.Event(enable_timing=True))
        self.events[-1].record()

    def intervals_s(self) -> list[float]:
        torch.cuda.synchronize()
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in zip(self.events, self.events[1:], strict=False)]


def copy_bandwidth(device: str) -> float:
    """GB/s, read and written, of copying a tensor far larger than any cache."""
    source = torch.zeros(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times_s = []
    for _ in range(WARM_UP + ROUNDS[device]):
        clock = GpuClock() if device == "cuda" else CpuClock()
        clock.mark()
        target.copy_(source)
        clock.mark()
        times_s += clock.intervals_s()
    return 2 * source.nbytes / statistics.median(times_s[WARM_UP:]) / 1e9


# Reporting


def run(out: Path | None, commit: str | None) -> int:
    """Measure in bfloat16, print a table, and write one JSON line for each row; returns the exit code.

    Args:
        out: in a folder that is there; each operator's rows are in it as soon as they are measured.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    facts = {
        "device": gpu or f"{platform.machine()}, {torch.get_num_threads()} threads",
        "implementation": "triton" if gpu else "numba",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }
    title = "Triton kernels" if gpu else "numba loops (the Triton kernels need a GPU: not measured)"
    print(f"{title} on {facts['device']}, torch {facts['torch']}, triton {facts['triton']}")
    line = "{:22} {:9} {:22} {:>10} {:>10} {:>10} {:>9} {:>10} {:>6} {:>8}"
    heads = "kernel ms", "eager ms", "compiled", "x eager", "x compiled", "GB/s", "of copy"
    print(line.format("operator", "pass", "N, K, C, H, W", *heads))
    gains: dict[tuple[str, str, str], list[float]] = {}
    if out is not None:
        out.write_text("")
    try:
        for group in rows(device, GPU_SHAPES if gpu else CPU_SHAPES, torch.bfloat16):
            if out is not None:
                with out.open("a") as file:
                    file.writelines(json.dumps(row | facts) + "\n" for row in group)
            row, times_s = group[0], {row["candidate"]: row["median_s"] for row in group}
            milliseconds, ratios = [], []
            for name in ("kernel", "eager", "compiled"):
                measured = name in times_s
                milliseconds.append(f"{times_s[name] * 1e3:.3f}" if measured else "-")
                if name != "kernel":
                    ratios.append(f"{times_s[name] / times_s['kernel']:.2f}" if measured else "-")
                    if measured:
                        key = row["op"], row["pass"], name
                        gains.setdefault(key, []).append(times_s[name] / times_s["kernel"])
            gb_per_s = row["bytes"] / times_s["kernel"] / 1e9
            rates = f"{gb_per_s:.0f}", f"{gb_per_s / row['copy_gb_per_s']:.0%}"
            shape = ", ".join(map(str, row["shape_NKCHW"]))
            print(line.format(row["op"], row["pass"], shape, *milliseconds, *ratios, *rates), flush=True)
    except ArithmeticError as error:
        print(error, file=sys.stderr)
        return 1
    print("\nGeometric means over the shapes:")
    for (op, direction, name), values in gains.items():
        print(f"{op:22} {direction:9} {statistics.geometric_mean(values):.2f} x {name}")
    if not any(name == "compiled" for *_, name in gains):
        print("Compiled PyTorch was not measured: torch.compile found no C++ compiler.")
    return 0
