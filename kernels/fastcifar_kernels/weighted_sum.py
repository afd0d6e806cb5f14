"""out[n] = sum over k of coef[n, k] * y[n, k], plus a residual: the heart of a dynamic convolution.

Traffic in units of N * P * C elements: forward reads K (and 1 for a residual) and writes 1; backward reads K + 1 and
writes K. Coefficients are a few kilobytes. Sums are taken in float32.
"""

# numba and triton change what their decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import numba
import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcifar_kernels.layout import (
    as_pixels,
    as_rows,
    check_experts,
    computes_in_float32,
    empty_experts,
    empty_map,
    runs_triton,
)
from fastcifar_kernels.loops import PIECE_PIXELS, as_array, narrow, pieces_of, widen
from fastcifar_kernels.tiles import bounds, cut, place, walk

EXPERTS_AT_ONCE = 2  # in the backward kernel, which keeps a running sum for each element of their tiles


def weighted_sum_reference(y_NKCHW: Tensor, coef_NK: Tensor, residual_NCHW: Tensor | None = None) -> Tensor:
    """The same in plain torch: the truth the kernels are held to."""
    out_NCHW = (y_NKCHW * coef_NK[:, :, None, None, None].to(y_NKCHW.dtype)).sum(dim=1)
    return out_NCHW if residual_NCHW is None else out_NCHW + residual_NCHW


def weighted_sum(y_NKCHW: Tensor, coef_NK: Tensor, residual_NCHW: Tensor | None = None) -> Tensor:
    """Sum K feature maps with coefficients of each sample.

    Args:
        y_NKCHW: float32, bfloat16 or float16. Fastest as `conv(x).unflatten(1, (K, C))` of a channels-last convolution
            with K * C filters; any other layout is copied first.
        coef_NK: any of these types; used as float32.
        residual_NCHW: added to the sum; of the type of `y_NKCHW`.

    Returns:
        [N, C, H, W], channels-last, of the type of `y_NKCHW`. NaN and infinity propagate as in plain torch.

    Raises:
        ValueError: shapes, types or devices do not belong together, or one sample has 2**31 elements or more.
    """
    check_experts(y_NKCHW, coef_NK, residual_NCHW)
    return _weighted_sum(y_NKCHW, coef_NK.float(), residual_NCHW)


# Triton


@triton.jit
def _weighted_sum_fwd_kernel(
    y_ptr, coef_ptr, residual_ptr, out_ptr,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    RESIDUAL: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    first, end = walk(all_pieces, pieces_per_program)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            at_PC = n * pixels * channels + p * channels + c_1C
            out_PC = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            if RESIDUAL:
                out_PC += tl.load(residual_ptr + at_PC, inside, 0)
            for k in tl.static_range(EXPERTS):
                coef = tl.load(coef_ptr + n * EXPERTS + k)
                y_PC = tl.load(y_ptr + n * y_stride_n + p * y_stride_p + k * y_stride_k + c_1C, inside, 0)
                out_PC += coef * y_PC
            tl.store(out_ptr + at_PC, out_PC, inside)


@triton.jit
def _weighted_sum_bwd_kernel(
    y_ptr, coef_ptr, grad_ptr, grad_y_ptr, grad_coef_ptr,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    k0 = tl.program_id(0) * BLOCK_K
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    first, end = walk(all_pieces, pieces_per_program)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        coefs = ()
        sums = ()  # of grad * y, for each expert
        for i in tl.static_range(BLOCK_K):
            coefs += (tl.load(coef_ptr + n * EXPERTS + k0 + i),)
            sums += (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            grad_PC = tl.load(grad_ptr + n * pixels * channels + p * channels + c_1C, inside, 0).to(tl.float32)
            so_far = ()
            for i in tl.static_range(BLOCK_K):
                k = k0 + i
                y_PC = tl.load(y_ptr + n * y_stride_n + p * y_stride_p + k * y_stride_k + c_1C, inside, 0)
                so_far += (sums[i] + grad_PC * y_PC,)
                at_PC = (n * pixels + p) * EXPERTS * channels + k * channels + c_1C
                tl.store(grad_y_ptr + at_PC, coefs[i] * grad_PC, inside)
            sums = so_far
        part = (n * pieces + piece % pieces) * tl.num_programs(1) + tl.program_id(1)
        for i in tl.static_range(BLOCK_K):
            tl.store(grad_coef_ptr + part * EXPERTS + k0 + i, tl.sum(sums[i]))


def _triton_forward(y_NKCHW: Tensor, coef_NK: Tensor, residual_NCHW: Tensor | None, out_NCHW: Tensor) -> None:
    y_NPKC = as_rows(y_NKCHW)
    residual_NPC = None if residual_NCHW is None else as_pixels(residual_NCHW)
    work = cut(y_NPKC, experts_at_once=y_NPKC.size(2))
    _weighted_sum_fwd_kernel[work.grid](
        y_NPKC, coef_NK, residual_NPC, out_NCHW, RESIDUAL=residual_NPC is not None, **work.sizes
    )


def _triton_backward(y_NKCHW: Tensor, coef_NK: Tensor, grad_NCHW: Tensor, grad_y_NKCHW: Tensor) -> Tensor:
    y_NPKC = as_rows(y_NKCHW)
    work = cut(y_NPKC, EXPERTS_AT_ONCE)
    n, k = coef_NK.shape
    grad_coef_NSK = torch.empty((n, work.sizes["pieces"] * work.grid[1], k), device=coef_NK.device)
    _weighted_sum_bwd_kernel[work.grid](
        y_NPKC, coef_NK, as_pixels(grad_NCHW), grad_y_NKCHW, grad_coef_NSK, **work.sizes
    )
    return grad_coef_NSK.sum(dim=1)


# numba


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_forward(y_NPKC, coef_NK, residual_NPC, out_NPC, pieces):  # pragma: no cover
    pixels, experts, channels = y_NPKC.shape[1:]
    for piece in numba.prange(len(y_NPKC) * pieces):
        n, start = piece // pieces, piece % pieces * PIECE_PIXELS
        sum_C = np.empty(channels, np.float32)
        for p in range(start, min(start + PIECE_PIXELS, pixels)):
            for c in range(channels):
                sum_C[c] = widen(residual_NPC[n, p, c]) if len(residual_NPC) else np.float32(0)
            for k in range(experts):
                coef = coef_NK[n, k]
                for c in range(channels):
                    sum_C[c] += coef * widen(y_NPKC[n, p, k, c])
            for c in range(channels):
                out_NPC[n, p, c] = narrow(sum_C[c], out_NPC[n, p, c])


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_backward(y_NPKC, coef_NK, grad_NPC, grad_y_NPKC, grad_coef_SK, pieces):  # pragma: no cover
    pixels, experts, channels = y_NPKC.shape[1:]
    for piece in numba.prange(len(y_NPKC) * pieces):
        n, start = piece // pieces, piece % pieces * PIECE_PIXELS
        sum_KC = np.zeros((experts, channels), np.float32)
        for p in range(start, min(start + PIECE_PIXELS, pixels)):
            for k in range(experts):
                coef = coef_NK[n, k]
                for c in range(channels):
                    grad = widen(grad_NPC[n, p, c])
                    sum_KC[k, c] += grad * widen(y_NPKC[n, p, k, c])
                    grad_y_NPKC[n, p, k, c] = narrow(coef * grad, grad_y_NPKC[n, p, k, c])
        for k in range(experts):
            grad_coef_SK[piece, k] = sum_KC[k].sum()


def _cpu_forward(y_NKCHW: Tensor, coef_NK: Tensor, residual_NCHW: Tensor | None, out_NCHW: Tensor) -> None:
    y_NPKC = as_rows(y_NKCHW).contiguous()
    residual_NPC = y_NPKC.new_empty(0, 0, 0) if residual_NCHW is None else as_pixels(residual_NCHW)
    tensors = y_NPKC, coef_NK, residual_NPC, as_pixels(out_NCHW)
    _numba_forward(*[as_array(tensor) for tensor in tensors], pieces_of(y_NPKC.size(1)))


def _cpu_backward(y_NKCHW: Tensor, coef_NK: Tensor, grad_NCHW: Tensor, grad_y_NKCHW: Tensor) -> Tensor:
    y_NPKC = as_rows(y_NKCHW).contiguous()
    n, p, k, _ = y_NPKC.shape
    grad_coef_NSK = torch.empty((n, pieces_of(p), k))
    tensors = y_NPKC, coef_NK, as_pixels(grad_NCHW), as_rows(grad_y_NKCHW), grad_coef_NSK.view(-1, k)
    _numba_backward(*[as_array(tensor) for tensor in tensors], pieces_of(p))
    return grad_coef_NSK.sum(dim=1)


# The operators


@torch.library.custom_op("fastcifar_kernels::weighted_sum", mutates_args=())
def _weighted_sum(y_NKCHW: Tensor, coef_NK: Tensor, residual_NCHW: Tensor | None) -> Tensor:
    if computes_in_float32(y_NKCHW):
        residual_NCHW = None if residual_NCHW is None else residual_NCHW.float()
        return _weighted_sum(y_NKCHW.float(), coef_NK, residual_NCHW).to(y_NKCHW.dtype)
    out_NCHW = empty_map(y_NKCHW)
    if out_NCHW.numel():
        forward = _triton_forward if runs_triton(y_NKCHW) else _cpu_forward
        with torch.cuda.device_of(y_NKCHW):
            forward(y_NKCHW, coef_NK.contiguous(), residual_NCHW, out_NCHW)
    return out_NCHW


@torch.library.custom_op("fastcifar_kernels::weighted_sum_backward", mutates_args=())
def _weighted_sum_backward(y_NKCHW: Tensor, coef_NK: Tensor, grad_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    if computes_in_float32(y_NKCHW):
        grad_y_NKCHW, grad_coef_NK = _weighted_sum_backward(y_NKCHW.float(), coef_NK, grad_NCHW.float())
        return grad_y_NKCHW.to(y_NKCHW.dtype), grad_coef_NK
    grad_y_NKCHW = empty_experts(y_NKCHW)
    if not grad_y_NKCHW.numel():
        return grad_y_NKCHW, torch.zeros(coef_NK.shape, device=coef_NK.device)
    backward = _triton_backward if runs_triton(y_NKCHW) else _cpu_backward
    with torch.cuda.device_of(y_NKCHW):
        return grad_y_NKCHW, backward(y_NKCHW, coef_NK.contiguous(), grad_NCHW, grad_y_NKCHW)


@_weighted_sum.register_fake
def _(y_NKCHW, coef_NK, residual_NCHW):
    return empty_map(y_NKCHW)


@_weighted_sum_backward.register_fake
def _(y_NKCHW, coef_NK, grad_NCHW):
    return empty_experts(y_NKCHW), torch.empty(coef_NK.shape, device=coef_NK.device)


def _save(ctx, inputs, output) -> None:
    y_NKCHW, coef_NK, residual_NCHW = inputs
    ctx.save_for_backward(y_NKCHW, coef_NK)
    ctx.residual = residual_NCHW is not None


def _gradients(ctx, grad_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_y_NKCHW, grad_coef_NK = _weighted_sum_backward(*ctx.saved_tensors, grad_NCHW)
    return grad_y_NKCHW, grad_coef_NK, grad_NCHW if ctx.residual else None


_weighted_sum.register_autograd(_gradients, setup_context=_save)
