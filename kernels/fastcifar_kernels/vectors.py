"""Vectors for numba loops, as wide as the processor has them, and products of matrices made of them.

numba vectorises what LLVM recognises. Where that is not enough, a function is written here, or in `winograd.py`, in
LLVM's own instructions, for vectors of any width. It takes addresses, distances in bytes, and first of all a tuple
that says what a vector is: `(np.uint16(0),) * 16` stands for 16 numbers of bfloat16, `(np.float32(0),) * 8` for 8 of
float32. numba compiles a loop anew for each type of its arguments, so one source serves every processor.
"""

import os
import platform
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastcifar_kernels.loops import FEATURES, Bfloat16

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
# What keeps oneDNN from instructions keeps us from them, too.
ISA_BELOW_AVX2 = ("SSE41", "AVX")
ISA_BELOW_AVX512 = (*ISA_BELOW_AVX2, "AVX2", "AVX2_VNNI", "AVX2_VNNI_2")
ISA_WITHOUT_BFLOAT16 = (*ISA_BELOW_AVX512, "AVX512_CORE", "AVX512_CORE_VNNI")


def _ask() -> dict[torch.dtype, int]:
    """Lanes of a vector by type; a type is missing where the processor does not multiply it."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {}
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if isa in ISA_BELOW_AVX2 or not {"avx2", "fma"} <= FEATURES:
        return {}
    if isa in ISA_BELOW_AVX512 or not {"avx512f", "avx512bw", "avx512dq"} <= FEATURES:
        return {torch.float32: 8}
    if isa in ISA_WITHOUT_BFLOAT16 or "avx512bf16" not in FEATURES:
        return {torch.float32: 16}
    return {torch.float32: 16, torch.bfloat16: 16}


LANES = _ask()


def runs(x: torch.Tensor) -> bool:
    """Whether loops of these functions take this tensor."""
    return x.device.type == "cpu" and x.dtype in LANES


def vector_of(dtype: torch.dtype) -> tuple:
    """The tuple that says so: see above."""
    return (np.uint16(0) if dtype == torch.bfloat16 else np.float32(0),) * LANES[dtype]


class Code:
    """What those functions write their instructions with: values are LLVM's, addresses 64-bit numbers."""

    def __init__(self, builder: ir.IRBuilder, vector: types.UniTuple):
        self.builder, self.lanes, self.bfloat16 = builder, vector.count, vector.dtype == types.uint16
        self.size = 2 if self.bfloat16 else 4  # bytes of a number in memory
        self.wide = ir.VectorType(F32, self.lanes)  # numbers as one computes with them
        self.narrow = ir.VectorType(I16, self.lanes) if self.bfloat16 else self.wide  # as they are stored

    def of_whole_lines(self) -> "Code":
        """The same with vectors of 64 bytes in memory, which LLVM makes of shorter ones."""
        return Code(self.builder, types.UniTuple(types.uint16 if self.bfloat16 else types.float32, 64 // self.size))

    def at(self, address, *offsets):
        """An address so many bytes further on."""
        for offset in offsets:
            address = self.builder.add(address, ir.Constant(I64, offset) if isinstance(offset, int) else offset)
        return address

    def times(self, one, other):
        return self.builder.mul(one, ir.Constant(I64, other) if isinstance(other, int) else other)

    def read(self, address, kind):
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=1)

    def write(self, value, address) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=1)

    def addresses(self, place, count: int) -> list:
        """As many addresses as are stored there."""
        return [self.read(self.at(place, 8 * number), I64) for number in range(count)]

    def load(self, address):
        """A vector of numbers, widened."""
        value = self.read(address, self.narrow)
        if not self.bfloat16:
            return value
        kind = ir.VectorType(I32, self.lanes)
        shifted = self.builder.shl(self.builder.zext(value, kind), ir.Constant(kind, [16] * self.lanes))
        return self.builder.bitcast(shifted, self.wide)

    def narrowed(self, value):
        """A vector as it is stored."""
        if not self.bfloat16:
            return value
        return self.builder.bitcast(self.builder.fptrunc(value, ir.VectorType(Bfloat16(), self.lanes)), self.narrow)

    def zeros(self, kind):
        return ir.Constant(kind, None)

    def number(self, value: float):
        """A vector of one constant."""
        return ir.Constant(self.wide, [value] * self.lanes)

    def splat(self, number):
        """A vector of one number."""
        nothing = ir.Constant(ir.VectorType(number.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(nothing, number, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, nothing, self.zeros(ir.VectorType(I32, self.lanes)))

    def add(self, first, *others):
        for other in others:
            first = self.builder.fadd(first, other)
        return first

    def subtract(self, first, *others):
        for other in others:
            first = self.builder.fsub(first, other)
        return first

    def multiply(self, one, other):
        return self.builder.fmul(one, other)

    def multiply_add(self, one, other, total):
        """one * other + total, rounded once."""
        return self._call(f"llvm.fma.v{self.lanes}f32", one, other, total)

    def multiply_steps(self, one, other, total):
        """The same of steps: four bytes, which are one number, or two whose products are added up."""
        if not self.bfloat16:
            return self.multiply_add(one, other, total)
        factors = (self.builder.bitcast(value, _pairs(self.lanes)) for value in (one, other))
        return self._call("llvm.x86.avx512bf16.dpbf16ps.512", total, *factors)

    def _call(self, name: str, *values, result=None):
        kind = ir.FunctionType(result or self.wide, [value.type for value in values])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), values)

    def narrowed_pairs(self, first, second):
        """Two vectors as one of pairs of bfloat16."""
        kind = ir.VectorType(I16, 2 * self.lanes)
        both = self._call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", second, first, result=_pairs(self.lanes))
        order = [lane + side * self.lanes for lane in range(self.lanes) for side in (0, 1)]
        both = self.builder.bitcast(both, kind)
        return self.builder.shuffle_vector(both, both, ir.Constant(ir.VectorType(I32, len(order)), order))

    def variable(self, value):
        """Where a value stands that a loop changes: a register, once LLVM has seen it."""
        place = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, place)
        return place

    @contextmanager
    def repeat(self, count):
        """Loop so many times; gives the number of the turn."""
        with cgutils.for_range(self.builder, count, intp=I64) as loop:
            yield loop.index


def _pairs(lanes: int) -> ir.VectorType:
    return ir.VectorType(Bfloat16(), 2 * lanes)


def function(write: Callable[..., None]) -> Any:
    """Make a function for numba loops of one that writes it: `vector` in place of the code, then numbers."""

    def typer(vector, *numbers):
        if not all(isinstance(number, types.Integer) for number in numbers):
            return None  # to numba: there is no such function

        def generate(context, builder, signature, arguments):
            write(Code(builder, vector), *arguments[1:])
            return context.get_dummy_value()

        return types.void(vector, *[types.int64] * len(numbers)), generate

    names = write.__code__.co_varnames[1 : write.__code__.co_argcount]
    given = ", ".join(("vector", *names))
    scope = {"typer": typer}
    exec(f"def function(context, {given}): return typer({given})", scope)  # numba reads the signature
    return intrinsic(scope["function"])


@function
def clear(code, place, length):
    """So many bytes become 0, a multiple of a vector's."""
    with code.repeat(code.builder.udiv(length, ir.Constant(I64, 4 * code.lanes))) as turn:
        code.write(code.zeros(code.wide), code.at(place, code.times(turn, 4 * code.lanes)))


# A block of a product of matrices: lanes / 2 rows of `a`, `a_row` apart, and 2 * lanes columns of `b`. It is a sum over
# steps of four bytes, `a_step` and `b_step` apart: one number, or two of bfloat16. Of `b`, a step is a vector of
# columns, and the second half of them lies `b_next` after the first. The block is float32, its rows `c_row` apart. So
# many rows fit into the registers, and whatever is loaded serves two products of vectors or more.


@function
def multiply(code, a, a_row, a_step, b, b_next, b_step, steps, c, c_row):
    """c = a @ b"""
    _multiply(code, False, a, a_row, a_step, b, b_next, b_step, steps, c, c_row)


@function
def multiply_more(code, a, a_row, a_step, b, b_next, b_step, steps, c, c_row):
    """c += a @ b"""
    _multiply(code, True, a, a_row, a_step, b, b_next, b_step, steps, c, c_row)


def _multiply(code: Code, more: bool, a, a_row, a_step, b, b_next, b_step, steps, c, c_row) -> None:
    rows = [code.at(c, code.times(c_row, row)) for row in range(code.lanes // 2)]
    places = [[row, code.at(row, 4 * code.lanes)] for row in rows]
    zeros = code.zeros(code.wide)
    sums = [[code.variable(code.read(place, code.wide) if more else zeros) for place in pair] for pair in places]
    with code.repeat(steps) as step:
        left, right = code.at(a, code.times(step, a_step)), code.at(b, code.times(step, b_step))
        columns = code.read(right, code.wide), code.read(code.at(right, b_next), code.wide)
        for row, pair in enumerate(sums):
            value = code.splat(code.read(code.at(left, code.times(a_row, row)), F32))
            for total, column in zip(pair, columns, strict=True):
                code.builder.store(code.multiply_steps(value, column, code.builder.load(total)), total)
    for pair, places_of_pair in zip(sums, places, strict=True):
        for total, place in zip(pair, places_of_pair, strict=True):
            code.write(code.builder.load(total), place)
