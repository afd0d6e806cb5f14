"""Convolutions of blocked images that are transformed, with AMX and every width of vectors: `verify` sees one alone."""

# numba changes what its decorator wraps:
# pyright: reportCallIssue=false, reportArgumentType=false

import math
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcifar_kernels import amx, conv_blocked, conv_winograd, vectors, verify

WAYS = {"float32, 8": (torch.float32, 8), "float32, 16": (torch.float32, 16), "bfloat16, 16": (torch.bfloat16, 16)}
WITH_AMX = "bfloat16, AMX"


@pytest.fixture(params=[*WAYS, WITH_AMX])
def dtype(request, monkeypatch) -> torch.dtype:
    """With vectors of one width in one type, without AMX, or on AMX for any number of channels and pixels."""
    if request.param == WITH_AMX:
        if not amx.available():
            pytest.skip("no AMX here")
        blocked = sys.modules["fastcifar_kernels.conv_blocked"]
        monkeypatch.setattr(blocked, "TRANSFORMED_FILTERS", 0)
        monkeypatch.setattr(blocked, "TRANSFORMED_PIXELS", 0)
        return torch.bfloat16
    dtype, lanes = WAYS[request.param]
    if vectors.LANES.get(dtype, 0) < lanes:
        pytest.skip("no such vectors here")
    monkeypatch.setitem(vectors.LANES, dtype, lanes)
    monkeypatch.setattr(amx, "_AVAILABLE", False)
    return dtype


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(function, x_GHWMC: Tensor, w_OCHW: Tensor, pool: bool, grad: Tensor) -> list[Tensor]:
    leaves = [x_GHWMC.detach().requires_grad_(), w_OCHW.detach().requires_grad_()]
    out = function(*leaves, pool)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("shape", verify.SMALL)
def test_agrees_with_float64(shape, dtype):
    for case in verify.cases(shape, "cpu"):
        if case.op in verify.OF_BLOCKS:
            row = verify.judge(case, dtype)
            assert row.passed, row


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 3, 3, 9, 9))),
    band_bytes=st.sampled_from([1, 2**20, 2**23]),
    many_bytes=st.sampled_from([0, math.inf]),
)
def test_any_shape_however_much_is_done_at_a_time(shape, band_bytes, many_bytes):
    if torch.float32 not in vectors.LANES:
        pytest.skip("no AVX2 here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_winograd, "BAND_BYTES", band_bytes)
        patch.setattr(conv_winograd, "LONG_BAND_BYTES", band_bytes)
        patch.setattr(conv_winograd, "MANY_SUMS_BYTES", many_bytes)
        patch.setattr(amx, "_AVAILABLE", False)
        for case in verify.cases_of_groups(shape, normal):
            if case.op == "conv_blocked" and case.variant in ("", "pool"):
                row = verify.judge(case, torch.float32)
                assert row.passed, row


@pytest.mark.parametrize("together", [False, True])
def test_a_band_is_as_long_as_it_should_be(together):
    """All that lies between two times that sums are loaded, but for a tile that nobody needs."""
    left, right, *_, slots = conv_winograd._bands(10_000, 64, 32, torch.bfloat16, together)
    count = slots.shape[1] - 1
    most = conv_winograd.LONG_BAND_BYTES if together else conv_winograd.BAND_BYTES * numba.get_num_threads()
    assert 0.8 * most < (left.nbytes + right.nbytes) * count / (count + 1) < 1.01 * most


@pytest.mark.parametrize("many_bytes", [0, math.inf])
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 6, 100])
def test_threads_share_the_tiles(threads, many_bytes, dtype):
    """Also those of one group; the gradient of many filters they sum up together, of few each for itself."""
    x_GHWMC, w_OCHW = normal(4, 4, 5, 32, 64, dtype=dtype), normal(32, 64, 3, 3, seed=1) / 24
    grad = normal(4, 2, 2, 32, 32, seed=2, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba, "get_num_threads", lambda: threads)
        patch.setattr(conv_winograd, "MANY_SUMS_BYTES", many_bytes)
        found = results(conv_blocked, x_GHWMC, w_OCHW, True, grad)
    expected = results(conv_blocked, x_GHWMC, w_OCHW, True, grad)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).float().norm() <= (0.01 if dtype == torch.bfloat16 else 1e-5) * other.float().norm()


def test_the_largest_of_four_equal_pixels_is_the_first(dtype):
    """Of nothing but zeros, as of other numbers transformations would make slightly different ones."""
    x_GHWMC, w_OCHW = torch.zeros(1, 2, 2, 32, 32, dtype=dtype), torch.zeros(32, 32, 3, 3)
    w_OCHW[:, :, 1, 1] = 0.25
    grad = torch.ones(1, 1, 1, 32, 32, dtype=dtype)
    out, grad_x, _ = results(conv_blocked, x_GHWMC, w_OCHW, True, grad)
    assert not out.any()
    assert (grad_x[:, 0, 0] - 8).abs().max() < 0.1
    grad_x[:, 0, 0] = 0
    assert grad_x.abs().max() < 0.1


@numba.njit
def product(vector, more, a, a_row, a_step, b, b_next, b_step, steps, c, c_row):
    if more:
        vectors.multiply_more(vector, a, a_row, a_step, b, b_next, b_step, steps, c, c_row)
    else:
        vectors.multiply(vector, a, a_row, a_step, b, b_next, b_step, steps, c, c_row)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_block_of_a_product_of_matrices(steps, more, dtype):
    """Of whole numbers, so exactly; rows and columns of `a` may lie either way."""
    vector, pairs, lanes = vectors.vector_of(dtype), 4 // dtype.itemsize, vectors.LANES[dtype]
    rng = np.random.default_rng(steps)

    def whole(*size: int) -> Tensor:
        return torch.from_numpy(rng.integers(-8, 9, size)).to(dtype)

    rows = lanes // 2
    a, b = whole(rows, steps, pairs), whole(2, steps, lanes, pairs)
    expected = torch.einsum("rsp,hslp->rhl", a.float(), b.float()).reshape(rows, 2 * lanes)
    for lying, distances in ((a, (4 * steps, 4)), (a.transpose(0, 1).contiguous(), (4, 4 * rows))):
        c = torch.full((rows, 2 * lanes + 3), 5.0)
        size = b.data_ptr(), 4 * lanes * steps, 4 * lanes, steps, c.data_ptr(), 4 * c.size(1)
        product(vector, more, lying.data_ptr(), *distances, *size)
        assert torch.equal(c[:, : 2 * lanes], expected + 5 * more)
        assert (c[:, 2 * lanes :] == 5).all()


@pytest.mark.parametrize(("isa", "lanes"), [("AVX2", [8]), ("avx512_core", [16]), ("SSE41", [])])
def test_what_keeps_onednn_from_vectors_keeps_us(isa, lanes):
    if not {16, *lanes} <= {*vectors.LANES.values(), 8}:
        pytest.skip("no such vectors here")
    command = "from fastcifar_kernels import vectors; print([*vectors.LANES.values()])"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{lanes}\n"
