"""What the Triton compiler makes of every kernel, found out without a GPU: registers, spills, width of memory accesses.

python -m fastcifar_kernels.compiled [--arch 80 90 100]

The launchers run as they do on a GPU, on tensors without memory ("meta"), with a driver that knows an architecture but
has no device; each launch stops after compiling. Numbers come from the machine code (cuobjdump, which triton brings).
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastcifar_kernels  # noqa: F401 (all its modules)

ARCHITECTURES = (80, 90, 100)  # Ampere (A100), Hopper (H100, H200), Blackwell (B200)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, K, C, H, W: two layers of a network, many experts, one of everything, and nothing that 16 bytes divide.
SHAPES = (
    (512, 4, 64, 32, 32),
    (512, 4, 512, 8, 8),
    (32, 16, 128, 16, 16),
    (1, 1, 8, 7, 5),
    (3, 5, 12, 3, 3),
)  # N K C H W


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one architecture and one set of arguments."""

    arch: int
    kernel: str
    dtype: str
    shape: tuple[int, ...]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loads: dict[int, int]  # bits of a global load of one thread: how many there are
    stores: dict[int, int]


class NoDevice:
    """A driver that compiles for an architecture and has no device of it."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiling_only(arch: int) -> Iterator[list]:
    """Every kernel launched inside is compiled for `arch`, put into the list, and not run."""
    launched, run = [], JITFunction.run

    def compile_instead(self, *arguments, grid, warmup, **sizes):
        launched.append((self.fn.__name__, run(self, *arguments, grid=grid, warmup=True, **sizes)))

    with mock.patch.object(driver, "_active", NoDevice(arch)), mock.patch.object(JITFunction, "run", compile_instead):
        yield launched


def launches(shape: tuple[int, ...], dtype: torch.dtype) -> list[Callable[[], object]]:
    """Every launcher of the package with arguments of this shape, [N, K, C, H, W], ready to be called."""
    n, k, c, h, w = shape
    operators = {name: sys.modules[f"fastcifar_kernels.{name}"] for name in triton_modules()}

    def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    y_NKCHW = meta(n, h, w, k, c, dtype=dtype).permute(0, 3, 4, 1, 2)
    map_NCHW, coef_NK = meta(n, h, w, c, dtype=dtype).permute(0, 3, 1, 2), meta(n, k)
    affine = [meta(k, c) for _ in range(4)]
    images, out = meta(n, h, w, 3, dtype=torch.uint8), meta(n, h, w, 3, dtype=dtype)
    drawn = meta(n, dtype=torch.int64), meta(n, 2, dtype=torch.int64), meta(n, dtype=torch.bool), meta(n, 3), meta(n, 3)
    w_KM, out_NM = meta(k, c * c * 9), meta(n, c * c * 9, dtype=dtype)
    plain, normalised = operators["weighted_sum"], operators["bn_relu_weighted_sum"]
    aggregate, statistics = operators["aggregate_weights"], operators["batch_statistics"]
    copies, gelu = operators["scaled_copies"], operators["bn_gelu"]
    rows, norm = map_NCHW.permute(0, 2, 3, 1), (meta(c), meta(c), meta(c))
    return [
        lambda: plain._triton_forward(y_NKCHW, coef_NK, None, map_NCHW),
        lambda: plain._triton_forward(y_NKCHW, coef_NK, map_NCHW, map_NCHW),
        lambda: plain._triton_backward(y_NKCHW, coef_NK, map_NCHW, y_NKCHW),
        lambda: copies._triton_forward(map_NCHW, coef_NK, y_NKCHW),
        lambda: copies._triton_backward(y_NKCHW, coef_NK, map_NCHW, map_NCHW),
        lambda: statistics._triton_statistics(y_NKCHW, meta(k, c), meta(k, c)),
        lambda: normalised._triton_forward(y_NKCHW, coef_NK, affine, None, 1e-5, map_NCHW),
        lambda: normalised._triton_forward(y_NKCHW, coef_NK, affine, map_NCHW, 1e-5, map_NCHW),
        lambda: normalised._triton_backward(y_NKCHW, coef_NK, affine, map_NCHW, 1e-5, True, y_NKCHW),
        lambda: normalised._triton_backward(y_NKCHW, coef_NK, affine, map_NCHW, 1e-5, False, y_NKCHW),
        lambda: gelu._triton_forward(rows, norm, 1e-5, rows),
        lambda: gelu._triton_backward(rows, norm, rows, 1e-5, True, rows),
        lambda: gelu._triton_backward(rows, norm, rows, 1e-5, False, rows),
        lambda: operators["crop_flip"]._triton_forward(images, *drawn, True, out),
        lambda: operators["crop_flip"]._triton_forward(images, *drawn, False, out),
        lambda: aggregate._triton_forward(w_KM, coef_NK, out_NM),
        lambda: aggregate._triton_backward(w_KM, coef_NK, out_NM),
    ]


def triton_modules() -> tuple[str, ...]:
    plain = "weighted_sum", "scaled_copies", "batch_statistics", "aggregate_weights"
    return *plain, "bn_relu_weighted_sum", "bn_gelu", "crop_flip"


def examine(arch: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Compiled]:
    """Compile every kernel for this architecture, shape [N, K, C, H, W] and type."""
    with compiling_only(arch) as launched:
        for launch in launches(shape, dtype):
            launch()
    rows = []
    for name, kernel in launched:
        usage = resource_usage(kernel.asm["cubin"])
        accesses = [access_widths(kernel.asm["ptx"], which) for which in ("ld", "st")]
        registers, spilled = usage["REG"], usage["STACK"] + usage["LOCAL"]
        rows.append(Compiled(arch, name, str(dtype)[6:], shape, registers, spilled, kernel.metadata.shared, *accesses))
    return rows


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL and so on, as cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", report.stdout)}


def access_widths(ptx: str, which: str) -> dict[int, int]:
    """How many global loads ("ld") or stores ("st") of so many bits a thread's program contains.

    A copy from global to shared memory (cp.async) is a load.
    """
    found = re.findall(rf"\b{which}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+),", ptx) if which == "ld" else []
    widths = [int(count or 1) * int(bits) for count, bits in found] + [int(size, 16) * 8 for size in copies]
    return dict(sorted(Counter(widths).items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, such as 90")
    chosen = parser.parse_args()
    print(f"triton {triton.__version__}; loads and stores: bits of one access x how many in the program")
    line = "{:>6} {:40} {:9} {:20} {:>9} {:>7} {:>6}  {:28} {}"
    print(line.format("arch", "kernel", "dtype", "N, K, C, H, W", "registers", "spilled", "shared", "loads", "stores"))
    printed = set()
    for arch in chosen.arch:
        for shape in SHAPES:
            for dtype in DTYPES:
                for row in examine(arch, shape, dtype):
                    widths = [" ".join(f"{bits}x{count}" for bits, count in w.items()) for w in (row.loads, row.stores)]
                    numbers = row.registers, row.spilled_bytes, row.shared_bytes
                    size = ", ".join(map(str, shape))
                    text = line.format(f"sm_{arch}", row.kernel.strip("_"), row.dtype, size, *numbers, *widths)
                    if text not in printed:  # some are launched in several ways that compile to the same
                        print(text)
                    printed.add(text)


if __name__ == "__main__":
    main()
