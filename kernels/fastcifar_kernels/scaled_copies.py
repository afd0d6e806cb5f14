"""out[n, k] = coef[n, k] * x[n]: K scaled copies of a feature map, so that one convolution can sum over experts.

The transpose of `weighted_sum`: each one's backward is the other's forward, with the coefficients' gradient beside.

Traffic in units of N * P * C elements: forward reads 1 and writes K; backward reads K + 1 and writes 1.
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
    check_companion,
    check_stack,
    check_values,
    computes_in_float32,
    empty_map,
    runs_triton,
)
from fastcifar_kernels.loops import PIECE_PIXELS, as_array, narrow, pieces_of, widen
from fastcifar_kernels.tiles import bounds, cut, place, walk


def scaled_copies_reference(x_NCHW: Tensor, coef_NK: Tensor) -> Tensor:
    """The same in plain torch: the truth the kernels are held to."""
    return x_NCHW.unsqueeze(1) * coef_NK[:, :, None, None, None].to(x_NCHW.dtype)


def scaled_copies(x_NCHW: Tensor, coef_NK: Tensor) -> Tensor:
    """Scale K copies of each sample by its coefficients.

    Args:
        x_NCHW: float32, bfloat16 or float16; fastest channels-last, any other layout is copied first.
        coef_NK: any of these types; used as float32.

    Returns:
        [N, K, C, H, W] of the type of `x_NCHW`; its `.flatten(1, 2)` is a channels-last [N, K * C, H, W].

    Raises:
        ValueError: shapes, types or devices do not belong together, or one sample's copies have 2**31 elements or more.
    """
    check_values("x_NCHW", x_NCHW, 4)
    check_values("coef_NK", coef_NK, 2)
    check_companion("coef_NK", coef_NK, (x_NCHW.size(0), coef_NK.size(1)), "x_NCHW", x_NCHW)
    check_stack("coef_NK", coef_NK, coef_NK.size(1))
    copies_NKCHW = x_NCHW.unsqueeze(1).expand(-1, coef_NK.size(1), -1, -1, -1)
    check_stack("x_NCHW, copied for every coefficient,", copies_NKCHW, coef_NK.size(1))
    return _scaled_copies(x_NCHW, coef_NK.float())


def _empty_copies(x_NCHW: Tensor, experts: int) -> Tensor:
    n, c, h, w = x_NCHW.shape
    return torch.empty((n, h, w, experts, c), dtype=x_NCHW.dtype, device=x_NCHW.device).permute(0, 3, 4, 1, 2)


# Triton


@triton.jit
def _scaled_copies_fwd_kernel(
    x_ptr, coef_ptr, out_ptr,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    first, end = walk(all_pieces, pieces_per_program)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            x_PC = tl.load(x_ptr + n * pixels * channels + p * channels + c_1C, inside, 0)
            for k in tl.static_range(EXPERTS):
                coef = tl.load(coef_ptr + n * EXPERTS + k)
                tl.store(out_ptr + n * y_stride_n + p * y_stride_p + k * y_stride_k + c_1C, coef * x_PC, inside)


@triton.jit
def _scaled_copies_bwd_kernel(
    grad_ptr, coef_ptr, x_ptr, grad_x_ptr, grad_coef_ptr,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    first, end = walk(all_pieces, pieces_per_program)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        sums = ()  # of grad * x, for each expert
        for _k in tl.static_range(EXPERTS):
            sums += (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            at_PC = n * pixels * channels + p * channels + c_1C
            x_PC = tl.load(x_ptr + at_PC, inside, 0).to(tl.float32)
            grad_x_PC = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            so_far = ()
            for k in tl.static_range(EXPERTS):
                coef = tl.load(coef_ptr + n * EXPERTS + k)
                grad_PC = tl.load(grad_ptr + n * y_stride_n + p * y_stride_p + k * y_stride_k + c_1C, inside, 0)
                grad_x_PC += coef * grad_PC
                so_far += (sums[k] + x_PC * grad_PC,)
            sums = so_far
            tl.store(grad_x_ptr + at_PC, grad_x_PC, inside)
        part = (n * pieces + piece % pieces) * tl.num_programs(1) + tl.program_id(1)
        for k in tl.static_range(EXPERTS):
            tl.store(grad_coef_ptr + part * EXPERTS + k, tl.sum(sums[k]))


def _triton_forward(x_NCHW: Tensor, coef_NK: Tensor, out_NKCHW: Tensor) -> None:
    work = cut(as_rows(out_NKCHW), experts_at_once=out_NKCHW.size(1))
    _scaled_copies_fwd_kernel[work.grid](as_pixels(x_NCHW), coef_NK, out_NKCHW, **work.sizes)


def _triton_backward(grad_NKCHW: Tensor, coef_NK: Tensor, x_NCHW: Tensor, grad_x_NCHW: Tensor) -> Tensor:
    grad_NPKC = as_rows(grad_NKCHW)
    n, k = coef_NK.shape
    work = cut(grad_NPKC, experts_at_once=k)
    grad_coef_NSK = torch.empty((n, work.sizes["pieces"] * work.grid[1], k), device=coef_NK.device)
    _scaled_copies_bwd_kernel[work.grid](
        grad_NPKC, coef_NK, as_pixels(x_NCHW), grad_x_NCHW, grad_coef_NSK, **work.sizes
    )
    return grad_coef_NSK.sum(dim=1)


# numba


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_forward(x_NPC, coef_NK, out_NPKC, pieces):  # pragma: no cover
    pixels, experts, channels = out_NPKC.shape[1:]
    for piece in numba.prange(len(out_NPKC) * pieces):
        n, start = piece // pieces, piece % pieces * PIECE_PIXELS
        for p in range(start, min(start + PIECE_PIXELS, pixels)):
            for k in range(experts):
                coef = coef_NK[n, k]
                for c in range(channels):
                    out_NPKC[n, p, k, c] = narrow(coef * widen(x_NPC[n, p, c]), out_NPKC[n, p, k, c])


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_backward(grad_NPKC, coef_NK, x_NPC, grad_x_NPC, grad_coef_SK, pieces):  # pragma: no cover
    pixels, experts, channels = grad_NPKC.shape[1:]
    for piece in numba.prange(len(grad_NPKC) * pieces):
        n, start = piece // pieces, piece % pieces * PIECE_PIXELS
        coef_sum_KC = np.zeros((experts, channels), np.float32)
        sum_C = np.empty(channels, np.float32)
        for p in range(start, min(start + PIECE_PIXELS, pixels)):
            sum_C[:] = 0
            for k in range(experts):
                coef = coef_NK[n, k]
                for c in range(channels):
                    grad = widen(grad_NPKC[n, p, k, c])
                    coef_sum_KC[k, c] += grad * widen(x_NPC[n, p, c])
                    sum_C[c] += coef * grad
            for c in range(channels):
                grad_x_NPC[n, p, c] = narrow(sum_C[c], grad_x_NPC[n, p, c])
        for k in range(experts):
            grad_coef_SK[piece, k] = coef_sum_KC[k].sum()


def _cpu_forward(x_NCHW: Tensor, coef_NK: Tensor, out_NKCHW: Tensor) -> None:
    tensors = as_pixels(x_NCHW), coef_NK, as_rows(out_NKCHW)
    _numba_forward(*[as_array(tensor) for tensor in tensors], pieces_of(tensors[0].size(1)))


def _cpu_backward(grad_NKCHW: Tensor, coef_NK: Tensor, x_NCHW: Tensor, grad_x_NCHW: Tensor) -> Tensor:
    grad_NPKC = as_rows(grad_NKCHW).contiguous()
    n, p, k, _ = grad_NPKC.shape
    grad_coef_NSK = torch.empty((n, pieces_of(p), k))
    tensors = grad_NPKC, coef_NK, as_pixels(x_NCHW), as_pixels(grad_x_NCHW), grad_coef_NSK.view(-1, k)
    _numba_backward(*[as_array(tensor) for tensor in tensors], pieces_of(p))
    return grad_coef_NSK.sum(dim=1)


# The operators


@torch.library.custom_op("fastcifar_kernels::scaled_copies", mutates_args=())
def _scaled_copies(x_NCHW: Tensor, coef_NK: Tensor) -> Tensor:
    if computes_in_float32(x_NCHW):
        return _scaled_copies(x_NCHW.float(), coef_NK).to(x_NCHW.dtype)
    out_NKCHW = _empty_copies(x_NCHW, coef_NK.size(1))
    if out_NKCHW.numel():
        forward = _triton_forward if runs_triton(x_NCHW) else _cpu_forward
        with torch.cuda.device_of(x_NCHW):
            forward(x_NCHW, coef_NK.contiguous(), out_NKCHW)
    return out_NKCHW


@torch.library.custom_op("fastcifar_kernels::scaled_copies_backward", mutates_args=())
def _scaled_copies_backward(grad_NKCHW: Tensor, coef_NK: Tensor, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    if computes_in_float32(x_NCHW):
        grad_x_NCHW, grad_coef_NK = _scaled_copies_backward(grad_NKCHW.float(), coef_NK, x_NCHW.float())
        return grad_x_NCHW.to(x_NCHW.dtype), grad_coef_NK
    grad_x_NCHW = empty_map(grad_NKCHW)
    if not grad_x_NCHW.numel():
        return grad_x_NCHW, torch.zeros(coef_NK.shape, device=coef_NK.device)
    backward = _triton_backward if runs_triton(x_NCHW) else _cpu_backward
    with torch.cuda.device_of(x_NCHW):
        return grad_x_NCHW, backward(grad_NKCHW, coef_NK.contiguous(), x_NCHW, grad_x_NCHW)


@_scaled_copies.register_fake
def _(x_NCHW, coef_NK):
    return _empty_copies(x_NCHW, coef_NK.size(1))


@_scaled_copies_backward.register_fake
def _(grad_NKCHW, coef_NK, x_NCHW):
    return empty_map(grad_NKCHW), torch.empty(coef_NK.shape, device=coef_NK.device)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_NKCHW: Tensor) -> tuple[Tensor, Tensor]:
    x_NCHW, coef_NK = ctx.saved_tensors
    return _scaled_copies_backward(grad_NKCHW, coef_NK, x_NCHW)


_scaled_copies.register_autograd(_gradients, setup_context=_save)
