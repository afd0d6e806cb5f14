"""What the numba loops share: bfloat16 and prefetching, which numba does not know, and how work is cut.

Tensors of bfloat16 travel as bit patterns and are widened to float32 to be used. A bfloat16 is the upper half of a
float32, so widening is a shift and narrowing a rounding; both compile to a few vector instructions.
"""

from pathlib import Path

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from fastcifar_kernels.compiled_loops import forget_stale

forget_stale(Path(__file__).parent)  # now, as whatever has loops imports this first

# Of the processor that numba compiles for: this one, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say another.
_told = vars(config)["CPU_FEATURES"]
_signed = get_host_cpu_features() if _told is None else _told  # "+avx2,-avx512f,..."
FEATURES = {name[1:] for name in _signed.split(",") if name.startswith("+")}
ROUNDS_TO_BFLOAT16 = "avx512bf16" in FEATURES  # by an instruction
PIECE_PIXELS = 64  # of one sample, handled by one thread at a time; sums of more than 64 values are sums of sums


def pieces_of(pixels: int) -> int:
    """Into how many pieces a sample is cut."""
    return -(-pixels // PIECE_PIXELS)


def parts_of(units: int) -> int:
    """How many threads share so many units of work."""
    return min(numba.get_num_threads(), units)


def as_array(tensor: Tensor) -> NDArray:
    """The memory of a contiguous float32 or bfloat16 CPU tensor as an array of float32 or uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@intrinsic
def widen(context, number):
    """The float32 that an element (float32, or bfloat16 as uint16) stands for."""
    if number == types.float32:
        return types.float32(number), lambda context, builder, signature, arguments: arguments[0]
    if number == types.uint16:
        return types.float32(number), _widen_bfloat16
    return None


def _widen_bfloat16(context, builder, signature, arguments):
    i32 = ir.IntType(32)
    return builder.bitcast(builder.shl(builder.zext(arguments[0], i32), ir.Constant(i32, 16)), ir.FloatType())


@intrinsic
def narrow(context, value, like):
    """A float32 as an element of the type that `like` has, rounded to nearest even; NaN stays NaN.

    Where the processor does it, subnormal numbers (below 1.2e-38) become 0.
    """
    if value != types.float32:
        return None
    if like == types.float32:
        return types.float32(value, like), lambda context, builder, signature, arguments: arguments[0]
    if like == types.uint16:
        return types.uint16(value, like), _narrow_bfloat16
    return None


class Bfloat16(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bfloat16)

    def __hash__(self) -> int:
        return hash(Bfloat16)


def _narrow_bfloat16(context, builder, signature, arguments):
    i32, i16 = ir.IntType(32), ir.IntType(16)
    value = arguments[0]
    if ROUNDS_TO_BFLOAT16:
        return builder.bitcast(builder.fptrunc(value, Bfloat16()), i16)
    bits = builder.bitcast(value, i32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(i32, 0x7FFF)))
    # Rounding the bits of a NaN could carry it over into an infinity.
    kept = builder.select(builder.fcmp_unordered("uno", value, value), ir.Constant(i32, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(kept, ir.Constant(i32, 16)), i16)


@intrinsic
def use_wide_vectors(context):
    """Have the function that calls this vectorised with 512 bits, where the processor has them.

    LLVM takes 256 by itself. With 512 BatchNorm and GELU take 0.75 of the time (bn_gelu.py).
    """

    def generate(context, builder, signature, arguments):
        # llvmlite's own `add` knows no attributes with a value.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def prefetch(context, array, place):
    """Have the memory of an element of a contiguous one-dimensional array on its way. Any place will do."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        # To read, keep in every cache, data.
        builder.call(function, [address, ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)])
        return context.get_dummy_value()

    return types.void(array, place), generate
