"""The matrix unit of recent Xeons (AMX) for numba loops: 32 x 32 blocks of a matrix product.

A tile register holds 16 rows of 64 bytes, and a core multiplies two every 16 cycles, also when they come from its L2
cache: with random numbers at 1.9 TFLOP/s in bfloat16 (3.75 with zeros), where torch.mm and oneDNN's convolutions reach
0.2 to 1.3 (LOG.md). Tiles 0 to 3 hold the block in float32 ([[0, 1], [2, 3]]), 4 and 5 rows of the left matrix, 6 and
7 columns of the right one. The right matrix lies in pairs: element (k, column) at [k // 2, column, k % 2].

numba does not know these instructions, so they stand here in assembly. Addresses must be multiples of 64: a tile that
straddles cache lines loads six times as slowly.
"""

import ctypes
import os
import platform
from pathlib import Path

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastcifar_kernels.layout import GROUP
from fastcifar_kernels.loops import FEATURES

SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18  # Linux, asm/prctl.h


def _ask() -> bool:
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return False
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if not ("AMX" in isa or isa in ("", "ALL", "DEFAULT")):  # what keeps oneDNN from AMX keeps us from it, too
        return False
    if not {"avx512f", "avx512bw", "avx512bf16"} <= FEATURES:  # what else the loops with AMX are compiled to
        return False
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    if not {"amx_tile", "amx_bf16"} <= set(flags.split()):
        return False
    llvmlite.binding.initialize_native_asmparser()
    return ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


_AVAILABLE = _ask()  # now, as none of it can be traced; torch's decorator for that takes 1.5 s to import


def available() -> bool:
    """Whether this process may use AMX in bfloat16: the processor has it, Linux grants it, nobody has forbidden it."""
    return _AVAILABLE


def runs(x: torch.Tensor) -> bool:
    """Whether the loops take this tensor."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and available()


def _whole_tiles() -> np.ndarray:
    """What `configure` loads: eight tiles of 16 rows of 64 bytes."""
    config = np.zeros(64, np.uint8)
    config[0] = 1  # palette
    config[16:32:2] = 64  # bytes of a row, 16 bits each
    config[48:56] = 16  # rows
    return config


WHOLE_TILES = _whole_tiles()


def _instructions(arguments: str, text: str, changed: str = ""):
    """A function for numba loops of integer arguments (addresses, bytes, counts) that runs this assembly.

    {name} in the text is the register of an argument. `changed` names the registers that the text writes to.
    """
    names = arguments.split()
    for number, name in enumerate(names):
        text = text.replace(f"{{{name}}}", f"${number}")
    constraints = ",".join(["r"] * len(names) + [f"~{{{name}}}" for name in (*changed.split(), "memory", "flags")])

    def generate(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.asm(kind, text, constraints, values, side_effect=True)
        return context.get_dummy_value()

    def typer(context, *kinds):
        return types.void(*(types.int64 for _ in kinds)), generate

    scope = {"typer": typer}
    given = "".join(f", {name}" for name in names)
    exec(f"def function(context{given}): return typer(context{given})", scope)  # numba reads the signature
    return intrinsic(scope["function"])


configure = _instructions("config", "ldtilecfg ({config})")
release = _instructions("", "tilerelease")
clear_block = _instructions("", "tilezero %tmm0\ntilezero %tmm1\ntilezero %tmm2\ntilezero %tmm3")

# block += left @ right, over `steps` times 32 values. Left: rows of `stride` bytes; `lower` are its rows from 16 on.
# Right: a tile for every step; those of its columns from 16 on lie from `further` on.
multiply_rows = _instructions(
    "left lower stride right further steps",
    """
    movq {left}, %rax
    movq {lower}, %rcx
    movq {right}, %rdx
    movq {further}, %r8
    movq {steps}, %rsi
    movl $$64, %edi
    1:
    tileloadd (%rdx,%rdi,1), %tmm6
    tileloadd (%rax,{stride},1), %tmm4
    tdpbf16ps %tmm6, %tmm4, %tmm0
    tileloadd (%rcx,{stride},1), %tmm5
    tdpbf16ps %tmm6, %tmm5, %tmm2
    tileloadd (%r8,%rdi,1), %tmm7
    tdpbf16ps %tmm7, %tmm4, %tmm1
    tdpbf16ps %tmm7, %tmm5, %tmm3
    addq $$64, %rax
    addq $$64, %rcx
    addq $$1024, %rdx
    addq $$1024, %r8
    decq %rsi
    jnz 1b
    """,
    "rax rcx rdx rsi rdi r8",
)

# The same where the left matrix lies in two tiles after each other for every step, too.
multiply_tiles = _instructions(
    "left right steps",
    """
    movq {left}, %rax
    movq {right}, %rdx
    movq {steps}, %rsi
    movl $$64, %edi
    1:
    tileloadd (%rdx,%rdi,1), %tmm6
    tileloadd (%rax,%rdi,1), %tmm4
    tdpbf16ps %tmm6, %tmm4, %tmm0
    tileloadd 1024(%rax,%rdi,1), %tmm5
    tdpbf16ps %tmm6, %tmm5, %tmm2
    tileloadd 1024(%rdx,%rdi,1), %tmm7
    tdpbf16ps %tmm7, %tmm4, %tmm1
    tdpbf16ps %tmm7, %tmm5, %tmm3
    addq $$2048, %rax
    addq $$2048, %rdx
    decq %rsi
    jnz 1b
    """,
    "rax rdx rsi rdi",
)

# The block from and to float32 [32, 32].
load_block = _instructions(
    "values",
    """
    movl $$128, %eax
    tileloadd ({values},%rax,1), %tmm0
    tileloadd 64({values},%rax,1), %tmm1
    tileloadd 2048({values},%rax,1), %tmm2
    tileloadd 2112({values},%rax,1), %tmm3
    """,
    "rax",
)
store_block = _instructions(
    "values",
    """
    movl $$128, %eax
    tilestored %tmm0, ({values},%rax,1)
    tilestored %tmm1, 64({values},%rax,1)
    tilestored %tmm2, 2048({values},%rax,1)
    tilestored %tmm3, 2112({values},%rax,1)
    """,
    "rax",
)

# float32 [32, 32] to bfloat16, rounded to nearest even, in rows that are `stride` bytes apart.
narrow_block = _instructions(
    "values out stride",
    """
    movq {values}, %rax
    movq {out}, %rcx
    movl $$32, %edx
    1:
    vmovups 64(%rax), %zmm0
    vcvtne2ps2bf16 (%rax), %zmm0, %zmm0
    vmovups %zmm0, (%rcx)
    addq $$128, %rax
    addq {stride}, %rcx
    decl %edx
    jnz 1b
    """,
    "rax rcx rdx zmm0",
)

# The largest of four blocks that lie after each other, element by element, as bfloat16 in rows `stride` bytes apart.
# Which of them it was stands in two 32-bit numbers for each row: the high and the low bits of its 32 channels.
narrow_largest = _instructions(
    "values out stride which which_stride",
    """
    movq {values}, %rax
    movq {out}, %rcx
    movq {which}, %rsi
    movl $$32, %edx
    1:
    vmovups (%rax), %zmm0
    vmovups 4096(%rax), %zmm1
    vmovups 8192(%rax), %zmm2
    vmovups 12288(%rax), %zmm3
    vcmpltps %zmm1, %zmm0, %k1
    vcmpltps %zmm3, %zmm2, %k2
    vmaxps %zmm1, %zmm0, %zmm0
    vmaxps %zmm3, %zmm2, %zmm2
    vcmpltps %zmm2, %zmm0, %k3
    vmaxps %zmm2, %zmm0, %zmm4
    kandw %k3, %k2, %k2
    kandnw %k1, %k3, %k1
    korw %k1, %k2, %k4
    vmovups 64(%rax), %zmm0
    vmovups 4160(%rax), %zmm1
    vmovups 8256(%rax), %zmm2
    vmovups 12352(%rax), %zmm3
    vcmpltps %zmm1, %zmm0, %k1
    vcmpltps %zmm3, %zmm2, %k2
    vmaxps %zmm1, %zmm0, %zmm0
    vmaxps %zmm3, %zmm2, %zmm2
    vcmpltps %zmm2, %zmm0, %k5
    vmaxps %zmm2, %zmm0, %zmm5
    kandw %k5, %k2, %k2
    kandnw %k1, %k5, %k1
    korw %k1, %k2, %k1
    kunpckwd %k3, %k5, %k3
    kunpckwd %k4, %k1, %k4
    kmovd %k3, (%rsi)
    kmovd %k4, 4(%rsi)
    vcvtne2ps2bf16 %zmm4, %zmm5, %zmm4
    vmovups %zmm4, (%rcx)
    addq $$128, %rax
    addq {stride}, %rcx
    addq {which_stride}, %rsi
    decl %edx
    jnz 1b
    """,
    "rax rcx rdx rsi zmm0 zmm1 zmm2 zmm3 zmm4 zmm5 k1 k2 k3 k4 k5",
)

# The reverse: 32 channels of bfloat16 to the one of four rows that they came from, 0 to the other three.
scatter_row = _instructions(
    "values which first second third fourth",
    """
    vmovups ({values}), %zmm0
    kmovd ({which}), %k1
    kmovd 4({which}), %k2
    kord %k1, %k2, %k3
    knotd %k3, %k3
    vmovdqu16 %zmm0, %zmm1 {%k3} {z}
    vmovups %zmm1, ({first})
    kandnd %k2, %k1, %k3
    vmovdqu16 %zmm0, %zmm1 {%k3} {z}
    vmovups %zmm1, ({second})
    kandnd %k1, %k2, %k3
    vmovdqu16 %zmm0, %zmm1 {%k3} {z}
    vmovups %zmm1, ({third})
    kandd %k1, %k2, %k3
    vmovdqu16 %zmm0, %zmm1 {%k3} {z}
    vmovups %zmm1, ({fourth})
    """,
    "zmm0 zmm1 k1 k2 k3",
)

# 2 x 2 pixels of three bfloat16 each, of 32 images from `first` on, into rows of 64 bytes. Images are `image` bytes
# apart, rows of pixels `row`; after the `last` image it is taken again.
copy_patches = _instructions(
    "values image row first last rows",
    """
    movq {rows}, %rcx
    movq {first}, %rdx
    leaq 2048(%rcx), %rsi
    1:
    movq %rdx, %rax
    cmpq {last}, %rax
    cmovgq {last}, %rax
    imulq {image}, %rax
    addq {values}, %rax
    movq (%rax), %rdi
    movq %rdi, (%rcx)
    movl 8(%rax), %edi
    movl %edi, 8(%rcx)
    addq {row}, %rax
    movq (%rax), %rdi
    movq %rdi, 12(%rcx)
    movl 8(%rax), %edi
    movl %edi, 20(%rcx)
    addq $$64, %rcx
    incq %rdx
    cmpq %rsi, %rcx
    jne 1b
    """,
    "rax rcx rdx rsi rdi",
)


# Into tiles: 32 rows (images) of bfloat16, `stride` bytes apart. Their rows are pairs of images as the right matrix, or
# channels as the left one, so that a product sums over images.


def _rows(builder, values, stride, channels: int) -> list:
    """The first `channels` of each of the 32 rows as vectors."""
    kind = ir.VectorType(ir.IntType(16), channels).as_pointer()
    addresses = [builder.add(values, builder.mul(stride, ir.Constant(stride.type, row))) for row in range(GROUP)]
    return [builder.load(builder.inttoptr(address, kind), align=2) for address in addresses]


def _pairs(builder, rows: list, channels: range) -> list:
    """For each pair of rows a vector of 32 bits for each channel."""
    picked = [(channel, channel + rows[0].type.count) for channel in channels]
    mask = ir.Constant(ir.VectorType(ir.IntType(32), 32), [place for pair in picked for place in pair])
    kind = ir.VectorType(ir.IntType(32), 16)
    return [
        builder.bitcast(builder.shuffle_vector(even, odd, mask), kind)
        for even, odd in zip(rows[::2], rows[1::2], strict=True)
    ]


def _store_tile(builder, vectors: list, out, offset: int) -> None:
    for row, vector in enumerate(vectors):
        address = builder.add(out, ir.Constant(out.type, offset + 64 * row))
        builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=64)


@intrinsic
def pair_rows(context, values, stride, out):
    """32 channels of 32 rows as two tiles of the right matrix."""

    def generate(context, builder, signature, arguments):
        values, stride, out = arguments
        rows = _rows(builder, values, stride, 32)
        _store_tile(builder, _pairs(builder, rows, range(16)), out, 0)
        _store_tile(builder, _pairs(builder, rows, range(16, 32)), out, 1024)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def transpose_rows(context, values, stride, out):
    """16 channels of 32 rows as one tile of the left matrix, a row for each channel."""

    def generate(context, builder, signature, arguments):
        values, stride, out = arguments
        vectors = _pairs(builder, _rows(builder, values, stride, 16), range(16))
        kind = ir.VectorType(ir.IntType(32), 16)
        for distance in (1, 2, 4, 8):  # swap ever larger squares across the diagonal
            upper = [lane if not lane & distance else lane + 16 - distance for lane in range(16)]
            lower = [lane + distance if not lane & distance else lane + 16 for lane in range(16)]
            for number in range(16):
                if not number & distance:
                    pair = vectors[number], vectors[number | distance]
                    vectors[number] = builder.shuffle_vector(*pair, ir.Constant(kind, upper))
                    vectors[number | distance] = builder.shuffle_vector(*pair, ir.Constant(kind, lower))
        _store_tile(builder, vectors, out, 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate
