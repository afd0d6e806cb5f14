"""The matrix unit: whether it may be used, and what each instruction does, beside numpy."""

# numba changes what its decorator wraps:
# pyright: reportCallIssue=false, reportArgumentType=false

import os
import platform
import subprocess
import sys

import llvmlite.binding
import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcifar_kernels import amx

needs_amx = pytest.mark.skipif(not amx.available(), reason="no AMX here")
RNG = np.random.default_rng(0)


def bits(*size: int) -> Tensor:
    """Any 16 bits, which must arrive as they are. In memory of torch's: it begins at multiples of 64 bytes."""
    return torch.from_numpy(RNG.integers(0, 2**16, size, np.uint16)).clone()


def whole(*size: int) -> Tensor:
    """Whole numbers that bfloat16 holds and float32 adds exactly."""
    return torch.from_numpy(RNG.integers(-8, 9, size)).float()


@pytest.mark.parametrize("isa", ["AVX512_CORE", "avx2"])
def test_what_keeps_onednn_from_amx_keeps_us(isa):
    command = "from fastcifar_kernels import amx; print(amx.available())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_only_bfloat16_on_a_cpu_runs():
    assert amx.runs(torch.zeros(1, dtype=torch.bfloat16)) == amx.available()
    assert not amx.runs(torch.zeros(1))
    assert not amx.runs(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


COMPILE = """
import sys
import llvmlite.binding
from numba import types
from fastcifar_kernels import conv_amx, conv_winograd

llvmlite.binding.initialize_native_asmparser()
patches = sys.modules["fastcifar_kernels.patches_gelu"]
of = lambda kind, dims: types.Array(kind, dims, "C")
named = {"pool": types.boolean, "turned": types.boolean, "tiles": of(types.uint8, 1), "x_NHWC": of(types.uint16, 4)}
named |= {"bias_O": of(types.float32, 1), "vector": types.UniTuple(types.uint16, 16)}
named |= {"out_GHWMO": of(types.uint16, 5), "grad_GHWMO": of(types.uint16, 5), "sums_GO": of(types.float32, 2)}
named |= {"rows_PMD": of(types.uint16, 3), "blocks_PMO": of(types.float32, 3)}
named |= {"v_P": of(types.uint16, 2), "m_P": of(types.float32, 2), "places_P": of(types.int64, 2)}
named |= {"zeros_P": of(types.uint16, 2), "beyond_P": of(types.uint16, 2), "amx_tiles": of(types.uint8, 1)}
loops = [conv_amx._forward, conv_amx._to_input, conv_amx._to_filters, patches._forward, patches._to_bias]
loops += [conv_winograd._forward, conv_winograd._to_input]
for loop in loops:
    names = loop.py_func.__code__.co_varnames[: loop.py_func.__code__.co_argcount]
    loop.compile(tuple(named.get(name, types.int64) for name in names))
    print("tdpbf16ps" in "".join(loop.inspect_asm().values()))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86 processor")
def test_loops_compile_for_a_processor_with_amx_on_any_other(tmp_path):
    """What most machines, these tests' among them, never run."""
    host = llvmlite.binding.get_host_cpu_features()
    features = [("+" if on else "-") + name for name, on in host.items() if not name.startswith(("amx", "avx512"))]
    features += ["+avx512f", "+avx512bw", "+avx512dq", "+avx512vl", "+avx512bf16", "+amx-tile", "+amx-bf16"]
    target = {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": ",".join(features)}
    environment = {**os.environ, **target, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 7


@numba.njit
def move_rows(values, stride, pairs, columns):
    amx.pair_rows(values, stride, pairs)
    amx.transpose_rows(values, stride, columns)


@needs_amx
@pytest.mark.parametrize("channels", [32, 96])
def test_rows_become_pairs_and_columns(channels):
    values_MC, pairs, columns_CM = bits(32, channels), bits(2, 16, 16, 2), bits(16, 32)
    move_rows(values_MC.data_ptr(), 2 * channels, pairs.data_ptr(), columns_CM.data_ptr())
    assert torch.equal(columns_CM, values_MC[:, :16].T)
    # Two tiles of 16 channels; in each, a row for every two images and a pair of values for every channel.
    assert torch.equal(pairs, values_MC[:, :32].view(16, 2, 2, 16).permute(2, 0, 3, 1))


@numba.njit
def multiply(left, lower, stride, right, further, pairs, steps, tiles, block, sums, config):
    amx.configure(config)
    amx.clear_block()
    amx.multiply_rows(left, lower, stride, right, further, steps)
    amx.store_block(block)
    amx.load_block(sums)
    amx.multiply_tiles(tiles, pairs, steps)
    amx.store_block(sums)
    amx.release()


@needs_amx
@pytest.mark.parametrize("steps", [1, 3])
def test_blocks_are_matrix_products(steps):
    left_MK, right_KN, given_MN = whole(32, 32 * steps), whole(32 * steps, 32), whole(32, 32)
    rows = left_MK.bfloat16()
    tiles = rows.view(2, 16, steps, 32).permute(2, 0, 1, 3).contiguous()
    pairs = right_KN.bfloat16().view(steps, 16, 2, 2, 16).permute(0, 3, 1, 4, 2).contiguous()
    right, further = (pairs[:, half].contiguous() for half in (0, 1))
    block_MN, sums_MN = torch.full((32, 32), torch.nan), given_MN.clone()
    multiply(
        rows.data_ptr(),
        rows[16:].data_ptr(),
        64 * steps,
        right.data_ptr(),
        further.data_ptr(),
        pairs.data_ptr(),
        steps,
        tiles.data_ptr(),
        block_MN.data_ptr(),
        sums_MN.data_ptr(),
        amx.WHOLE_TILES.ctypes.data,
    )
    assert torch.equal(block_MN, left_MK @ right_KN)
    assert torch.equal(sums_MN, given_MN + left_MK @ right_KN)


@numba.njit
def narrow(values, out, stride):
    amx.narrow_block(values, out, stride)


@needs_amx
def test_blocks_are_narrowed_to_nearest():
    values_MN, out_MC = torch.randn(32, 32), torch.zeros(32, 96, dtype=torch.bfloat16)
    narrow(values_MN.data_ptr(), out_MC[:, 32:].data_ptr(), 2 * 96)
    assert torch.equal(out_MC[:, 32:64], values_MN.bfloat16())
    assert not out_MC[:, :32].any()
    assert not out_MC[:, 64:].any()


@numba.njit
def largest(values, out, which, scattered):
    amx.narrow_largest(values, out, 64, which, 8)
    for m in range(32):
        place = scattered + 64 * m
        amx.scatter_row(out + 64 * m, which + 8 * m, place, place + 2048, place + 4096, place + 6144)


def bits_of(numbers_M: NDArray) -> NDArray:
    """The 32 bits of each number, the lowest first."""
    return numbers_M[:, None].view(np.uint32) >> np.arange(32, dtype=np.uint32) & 1


@needs_amx
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_of_four_goes_back_where_it_came_from(ties):
    """Of equals it is the first, as in torch."""
    values_4MN = whole(4, 32, 32) if ties else torch.randn(4, 32, 32)
    out_MN, which_M2 = torch.zeros(32, 32, dtype=torch.bfloat16), torch.zeros(32, 2, dtype=torch.int32)
    scattered_4MN = torch.full((4, 32, 32), torch.nan, dtype=torch.bfloat16)
    largest(values_4MN.data_ptr(), out_MN.data_ptr(), which_M2.data_ptr(), scattered_4MN.data_ptr())
    number_MN = values_4MN.numpy().argmax(axis=0)
    high_M, low_M = which_M2.numpy().T
    assert torch.equal(out_MN, values_4MN.amax(dim=0).bfloat16())
    assert np.array_equal(2 * bits_of(high_M) + bits_of(low_M), number_MN)
    came_from_4MN = torch.from_numpy(number_MN) == torch.arange(4)[:, None, None]
    assert torch.equal(scattered_4MN, out_MN.where(came_from_4MN, 0))
