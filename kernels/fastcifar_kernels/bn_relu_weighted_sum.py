"""out[n] = sum over k of coef[n, k] * relu(batch_norm(y[n, k])), plus a residual, written in one pass.

Traffic in units of N * P * C elements. Forward: reads K for the batch statistics (none in eval mode), then K (and 1 for
a residual), writes 1. Backward: reads K + 1 for the sums that all gradients share, then K + 1, and writes K. Nothing of
size K is kept or written but the gradient of y. Eager PyTorch writes K three times on the way forward alone.

With z = y - mean, scale = weight / std, a = scale * z + bias, and h = coef * grad where a > 0, else 0:
    grad of coef = sum of grad * relu(a)      grad of bias = sum of h      grad of weight = sum of h * z / std
    grad of y    = scale * (h - (grad of bias + z / std * grad of weight) / (N * P)); in eval mode scale * h
The mean is subtracted first: scale * y + shift would take fewer registers but lose what y and the mean have in common.
"""

# numba and triton change what their decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

import numba
import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastcifar_kernels.batch_statistics import batch_statistics
from fastcifar_kernels.layout import (
    as_pixels,
    as_rows,
    check_companion,
    check_experts,
    computes_in_float32,
    empty_experts,
    empty_map,
    runs_triton,
)
from fastcifar_kernels.loops import PIECE_PIXELS, as_array, narrow, pieces_of, widen
from fastcifar_kernels.tiles import bounds, cut, place, walk

# In the backward kernels. Two experts take 120 to 160 registers of a thread; four would take over 200 and leave too few
# threads to hide the memory's latency. So the gradient is read once for every two experts, the second time from cache.
EXPERTS_AT_ONCE = 2
KEPT_EXPERTS = 4  # in the forward kernel: what normalises more of them is loaded again for every tile


def bn_relu_weighted_sum_reference(
    y_NKCHW: Tensor,
    coef_NK: Tensor,
    weight_KC: Tensor,
    bias_KC: Tensor,
    running_mean_KC: Tensor | None = None,
    running_var_KC: Tensor | None = None,
    *,
    residual_NCHW: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The same in plain torch: the truth the kernels are held to."""
    running = [None if r is None else r.view(-1) for r in (running_mean_KC, running_var_KC)]
    weight, bias = weight_KC.flatten(), bias_KC.flatten()
    z = F.relu(F.batch_norm(y_NKCHW.flatten(1, 2), *running, weight, bias, training, momentum, eps))
    coef_NK111 = coef_NK[:, :, None, None, None].to(y_NKCHW.dtype)
    out_NCHW = (z.unflatten(1, tuple(weight_KC.shape)) * coef_NK111).sum(dim=1)
    return out_NCHW if residual_NCHW is None else out_NCHW + residual_NCHW


def bn_relu_weighted_sum(
    y_NKCHW: Tensor,
    coef_NK: Tensor,
    weight_KC: Tensor,
    bias_KC: Tensor,
    running_mean_KC: Tensor | None = None,
    running_var_KC: Tensor | None = None,
    *,
    residual_NCHW: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise and rectify K feature maps, and sum them with coefficients of each sample.

    Args:
        y_NKCHW: float32, bfloat16 or float16; fastest channels-last (see `weighted_sum`).
        coef_NK: used as float32, as are the following.
        weight_KC, bias_KC: BatchNorm's scale and shift, as `norm.weight.view(K, C)` of a BatchNorm2d(K * C).
        running_mean_KC, running_var_KC: updated in place in training if given, used in eval mode.
        residual_NCHW: added to the sum; of the type of `y_NKCHW`.
        training: normalise with the statistics of this batch; else with the running ones.
        momentum: share of this batch in the running statistics, as in torch.nn.BatchNorm2d.
        eps: added to the variance.

    Returns:
        [N, C, H, W], channels-last, of the type of `y_NKCHW`.

    Raises:
        ValueError: shapes, types or devices do not belong together; training with fewer than two values per channel, or
            eval mode without running statistics; one sample has 2**31 elements or more.
    """
    check_experts(y_NKCHW, coef_NK, residual_NCHW)
    n, k, c, h, w = y_NKCHW.shape
    for name, tensor in {
        "weight_KC": weight_KC,
        "bias_KC": bias_KC,
        "running_mean_KC": running_mean_KC,
        "running_var_KC": running_var_KC,
    }.items():
        if tensor is not None:
            check_companion(name, tensor, (k, c), "y_NKCHW", y_NKCHW)
    values = n * h * w
    if training:
        if values < 2:
            raise ValueError(
                f"training needs at least two values per channel, y_NKCHW of shape {tuple(y_NKCHW.shape)} has {values}."
            )
        mean_KC, variance_KC = batch_statistics(y_NKCHW)
        with torch.no_grad():
            if running_mean_KC is not None:
                running_mean_KC.lerp_(mean_KC.to(running_mean_KC.dtype), momentum)
            if running_var_KC is not None:
                unbiased_KC = variance_KC * (values / (values - 1))
                running_var_KC.lerp_(unbiased_KC.to(running_var_KC.dtype), momentum)
    elif running_mean_KC is None or running_var_KC is None:
        raise ValueError("running_mean_KC and running_var_KC are needed unless training.")
    else:
        mean_KC, variance_KC = running_mean_KC.float(), running_var_KC.float()
    return _bn_relu_weighted_sum(
        y_NKCHW, coef_NK.float(), mean_KC, variance_KC, weight_KC.float(), bias_KC.float(), residual_NCHW, eps, training
    )


# Triton


@triton.jit
def _affine(mean_ptr, variance_ptr, weight_ptr, bias_ptr, k, c_1C, channels, eps):
    """mean, 1 / std, scale and bias of some channels of one expert."""
    at, mask = k * channels + c_1C, c_1C < channels
    rstd_1C = 1 / tl.sqrt_rn(tl.load(variance_ptr + at, mask, 0) + eps)
    scale_1C = tl.load(weight_ptr + at, mask, 0) * rstd_1C
    return tl.load(mean_ptr + at, mask, 0), rstd_1C, scale_1C, tl.load(bias_ptr + at, mask, 0)


@triton.jit
def _term(y_tile_ptr, inside, coef, affine):
    """What one expert adds to a tile of the sum."""
    mean_1C, _rstd_1C, scale_1C, bias_1C = affine
    a_PC = scale_1C * (tl.load(y_tile_ptr, inside, 0) - mean_1C) + bias_1C
    return coef * tl.where(a_PC <= 0, 0.0, a_PC)  # in this form NaN stays NaN


@triton.jit
def _bn_relu_weighted_sum_fwd_kernel(
    y_ptr, coef_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, eps,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    RESIDUAL: tl.constexpr, KEEP: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    affine = ()
    if KEEP:  # what normalises each expert, in registers
        for k in tl.static_range(EXPERTS):
            affine += (_affine(mean_ptr, variance_ptr, weight_ptr, bias_ptr, k, c_1C, channels, eps),)
    first, end = walk(all_pieces, pieces_per_program)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        coefs = ()
        if KEEP:
            for k in tl.static_range(EXPERTS):
                coefs += (tl.load(coef_ptr + n * EXPERTS + k),)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            at_PC = n * pixels * channels + p * channels + c_1C
            out_PC = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            if RESIDUAL:
                out_PC += tl.load(residual_ptr + at_PC, inside, 0)
            y_tile_ptr = y_ptr + n * y_stride_n + p * y_stride_p + c_1C
            if KEEP:
                for k in tl.static_range(EXPERTS):
                    out_PC += _term(y_tile_ptr + k * y_stride_k, inside, coefs[k], affine[k])
            else:
                for k in range(EXPERTS):
                    parts = _affine(mean_ptr, variance_ptr, weight_ptr, bias_ptr, k, c_1C, channels, eps)
                    coef = tl.load(coef_ptr + n * EXPERTS + k)
                    out_PC += _term(y_tile_ptr + k * y_stride_k, inside, coef, parts)
            tl.store(out_ptr + at_PC, out_PC, inside)


@triton.jit
def _bn_relu_weighted_sum_sums_kernel(
    y_ptr, coef_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, grad_ptr, grad_coef_ptr, grad_affine_ptr, eps,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program's share of the gradients of coefficients, bias and weight."""
    k0 = tl.program_id(0) * BLOCK_K
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    affine = ()
    bias_sums = ()
    scale_sums = ()
    for i in tl.static_range(BLOCK_K):
        affine += (_affine(mean_ptr, variance_ptr, weight_ptr, bias_ptr, k0 + i, c_1C, channels, eps),)
        bias_sums += (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
        scale_sums += (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    first, end = walk(all_pieces, pieces_per_program)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        coefs = ()
        coef_sums = ()
        for i in tl.static_range(BLOCK_K):
            coefs += (tl.load(coef_ptr + n * EXPERTS + k0 + i),)
            coef_sums += (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            grad_PC = tl.load(grad_ptr + n * pixels * channels + p * channels + c_1C, inside, 0)
            to_coef = ()
            to_bias = ()
            to_scale = ()
            for i in tl.static_range(BLOCK_K):
                k = k0 + i
                mean_1C, _rstd_1C, scale_1C, bias_1C = affine[i]
                y_PC = tl.load(y_ptr + n * y_stride_n + p * y_stride_p + k * y_stride_k + c_1C, inside, 0)
                z_PC = y_PC - mean_1C
                a_PC = scale_1C * z_PC + bias_1C
                passed_PC = tl.where(a_PC <= 0, 0.0, grad_PC)
                to_coef += (coef_sums[i] + passed_PC * a_PC,)
                to_bias += (bias_sums[i] + coefs[i] * passed_PC,)
                to_scale += (scale_sums[i] + coefs[i] * passed_PC * z_PC,)
            coef_sums, bias_sums, scale_sums = to_coef, to_bias, to_scale
        part = (n * pieces + piece % pieces) * tl.num_programs(1) + tl.program_id(1)
        for i in tl.static_range(BLOCK_K):
            tl.store(grad_coef_ptr + part * EXPERTS + k0 + i, tl.sum(coef_sums[i]))
    for i in tl.static_range(BLOCK_K):
        k = k0 + i
        at_1C = (tl.program_id(2) * 2 * EXPERTS + k) * channels + c_1C
        rstd_1C = affine[i][1]
        tl.store(grad_affine_ptr + at_1C, tl.sum(bias_sums[i], axis=0, keep_dims=True), c_1C < channels)
        grad_weight_1C = rstd_1C * tl.sum(scale_sums[i], axis=0, keep_dims=True)
        tl.store(grad_affine_ptr + at_1C + EXPERTS * channels, grad_weight_1C, c_1C < channels)


@triton.jit
def _bn_relu_weighted_sum_bwd_kernel(
    y_ptr, coef_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, grad_ptr, grad_affine_ptr, grad_y_ptr, eps, values,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    BATCH_STATISTICS: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of y, given those of bias and weight."""
    k0 = tl.program_id(0) * BLOCK_K
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    affine = ()
    passed_back = ()  # what the batch's mean and deviation pass back, linear in z: level + slope * z
    for i in tl.static_range(BLOCK_K):
        affine += (_affine(mean_ptr, variance_ptr, weight_ptr, bias_ptr, k0 + i, c_1C, channels, eps),)
        if BATCH_STATISTICS:
            rstd_1C, scale_1C = affine[i][1], affine[i][2]
            at_1C = (k0 + i) * channels + c_1C
            grad_bias_1C = tl.load(grad_affine_ptr + at_1C, c_1C < channels, 0)
            grad_weight_1C = tl.load(grad_affine_ptr + at_1C + EXPERTS * channels, c_1C < channels, 0)
            passed_back += ((scale_1C * grad_bias_1C / values, scale_1C * rstd_1C * grad_weight_1C / values),)
    first, end = walk(all_pieces, pieces_per_program)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        coefs = ()
        for i in tl.static_range(BLOCK_K):
            coefs += (tl.load(coef_ptr + n * EXPERTS + k0 + i),)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            grad_PC = tl.load(grad_ptr + n * pixels * channels + p * channels + c_1C, inside, 0)
            for i in tl.static_range(BLOCK_K):
                k = k0 + i
                mean_1C, _rstd_1C, scale_1C, bias_1C = affine[i]
                y_PC = tl.load(y_ptr + n * y_stride_n + p * y_stride_p + k * y_stride_k + c_1C, inside, 0)
                z_PC = y_PC - mean_1C
                grad_y_PC = scale_1C * tl.where(scale_1C * z_PC + bias_1C <= 0, 0.0, coefs[i] * grad_PC)
                if BATCH_STATISTICS:
                    level_1C, slope_1C = passed_back[i]
                    grad_y_PC -= level_1C + slope_1C * z_PC
                at_PC = (n * pixels + p) * EXPERTS * channels + k * channels + c_1C
                tl.store(grad_y_ptr + at_PC, grad_y_PC, inside)


def _triton_forward(y_NKCHW, coef_NK, affine, residual_NCHW, eps, out_NCHW) -> None:
    y_NPKC = as_rows(y_NKCHW)
    residual_NPC = None if residual_NCHW is None else as_pixels(residual_NCHW)
    work = cut(y_NPKC, experts_at_once=y_NPKC.size(2))
    _bn_relu_weighted_sum_fwd_kernel[work.grid](
        y_NPKC,
        coef_NK,
        *affine,
        residual_NPC,
        out_NCHW,
        eps,
        RESIDUAL=residual_NPC is not None,
        KEEP=y_NPKC.size(2) <= KEPT_EXPERTS,
        **work.sizes,
    )


def _triton_backward(y_NKCHW, coef_NK, affine, grad_NCHW, eps, use_batch, grad_y_NKCHW) -> tuple[Tensor, Tensor]:
    y_NPKC, grad_NPC = as_rows(y_NKCHW), as_pixels(grad_NCHW)
    n, p, k, c = y_NPKC.shape
    work = cut(y_NPKC, EXPERTS_AT_ONCE)
    grad_coef_NSK = torch.empty((n, work.sizes["pieces"] * work.grid[1], k), device=y_NPKC.device)
    grad_affine_S2KC = torch.empty((work.splits, 2, k, c), device=y_NPKC.device)
    _bn_relu_weighted_sum_sums_kernel[work.grid](
        y_NPKC, coef_NK, *affine, grad_NPC, grad_coef_NSK, grad_affine_S2KC, eps, **work.sizes
    )
    grad_affine_2KC = grad_affine_S2KC.sum(dim=0)
    _bn_relu_weighted_sum_bwd_kernel[work.grid](
        y_NPKC, coef_NK, *affine, grad_NPC, grad_affine_2KC, grad_y_NKCHW, eps, float(n * p),
        BATCH_STATISTICS=use_batch, **work.sizes,
    )  # fmt: skip
    return grad_coef_NSK.sum(dim=1), grad_affine_2KC


# numba


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_forward(y_NPKC, coef_NK, mean_KC, scale_KC, bias_KC, residual_NPC, out_NPC, pieces):  # pragma: no cover
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
                    a = scale_KC[k, c] * (widen(y_NPKC[n, p, k, c]) - mean_KC[k, c]) + bias_KC[k, c]
                    sum_C[c] += coef * (np.float32(0) if a <= np.float32(0) else a)
            for c in range(channels):
                out_NPC[n, p, c] = narrow(sum_C[c], out_NPC[n, p, c])


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_sums(
    y_NPKC, coef_NK, mean_KC, scale_KC, bias_KC, grad_NPC, grad_coef_SK, grad_bias_SKC, grad_scale_SKC, pieces
):  # pragma: no cover
    """Each piece's share of the gradients of coefficients, bias and (times std) weight."""
    pixels, experts, channels = y_NPKC.shape[1:]
    for piece in numba.prange(len(y_NPKC) * pieces):
        n, start = piece // pieces, piece % pieces * PIECE_PIXELS
        coef_sum_KC = np.zeros((experts, channels), np.float32)
        bias_sum_KC = np.zeros((experts, channels), np.float32)
        scale_sum_KC = np.zeros((experts, channels), np.float32)
        for p in range(start, min(start + PIECE_PIXELS, pixels)):
            for k in range(experts):
                for c in range(channels):
                    z = widen(y_NPKC[n, p, k, c]) - mean_KC[k, c]
                    a = scale_KC[k, c] * z + bias_KC[k, c]
                    passed = np.float32(0) if a <= np.float32(0) else widen(grad_NPC[n, p, c])
                    coef_sum_KC[k, c] += passed * a
                    bias_sum_KC[k, c] += passed
                    scale_sum_KC[k, c] += passed * z
        for k in range(experts):
            grad_coef_SK[piece, k] = coef_sum_KC[k].sum()
            for c in range(channels):
                grad_bias_SKC[piece, k, c] = coef_NK[n, k] * bias_sum_KC[k, c]
                grad_scale_SKC[piece, k, c] = coef_NK[n, k] * scale_sum_KC[k, c]


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_backward(
    y_NPKC, coef_NK, mean_KC, scale_KC, bias_KC, level_KC, slope_KC, grad_NPC, grad_y_NPKC, pieces
):  # pragma: no cover
    pixels, experts, channels = y_NPKC.shape[1:]
    for piece in numba.prange(len(y_NPKC) * pieces):
        n, start = piece // pieces, piece % pieces * PIECE_PIXELS
        for p in range(start, min(start + PIECE_PIXELS, pixels)):
            for k in range(experts):
                coef = coef_NK[n, k]
                for c in range(channels):
                    z = widen(y_NPKC[n, p, k, c]) - mean_KC[k, c]
                    a = scale_KC[k, c] * z + bias_KC[k, c]
                    passed = np.float32(0) if a <= np.float32(0) else coef * widen(grad_NPC[n, p, c])
                    grad_y = scale_KC[k, c] * passed - (level_KC[k, c] + slope_KC[k, c] * z)
                    grad_y_NPKC[n, p, k, c] = narrow(grad_y, grad_y_NPKC[n, p, k, c])


def _cpu_forward(y_NKCHW, coef_NK, affine, residual_NCHW, eps, out_NCHW) -> None:
    mean_KC, variance_KC, weight_KC, bias_KC = affine
    y_NPKC = as_rows(y_NKCHW).contiguous()
    residual_NPC = y_NPKC.new_empty(0, 0, 0) if residual_NCHW is None else as_pixels(residual_NCHW)
    scale_KC = weight_KC / (variance_KC + eps).sqrt()
    tensors = y_NPKC, coef_NK, mean_KC, scale_KC, bias_KC, residual_NPC, as_pixels(out_NCHW)
    _numba_forward(*[as_array(tensor) for tensor in tensors], pieces_of(y_NPKC.size(1)))


def _cpu_backward(y_NKCHW, coef_NK, affine, grad_NCHW, eps, use_batch, grad_y_NKCHW) -> tuple[Tensor, Tensor]:
    mean_KC, variance_KC, weight_KC, bias_KC = affine
    y_NPKC, grad_NPC = as_rows(y_NKCHW).contiguous(), as_pixels(grad_NCHW)
    n, p, k, c = y_NPKC.shape
    pieces = pieces_of(p)
    rstd_KC = 1 / (variance_KC + eps).sqrt()
    scale_KC = weight_KC * rstd_KC
    grad_coef_NSK, grad_affine_2SKC = torch.empty((n, pieces, k)), torch.empty((2, n * pieces, k, c))
    tensors = y_NPKC, coef_NK, mean_KC, scale_KC, bias_KC, grad_NPC, grad_coef_NSK.view(-1, k), *grad_affine_2SKC
    _numba_sums(*[as_array(tensor) for tensor in tensors], pieces)
    grad_affine_2KC = grad_affine_2SKC.sum(dim=1)
    grad_affine_2KC[1] *= rstd_KC
    level_KC = slope_KC = torch.zeros(k, c)
    if use_batch:
        level_KC = scale_KC * grad_affine_2KC[0] / (n * p)
        slope_KC = scale_KC * rstd_KC * grad_affine_2KC[1] / (n * p)
    tensors = y_NPKC, coef_NK, mean_KC, scale_KC, bias_KC, level_KC, slope_KC, grad_NPC, as_rows(grad_y_NKCHW)
    _numba_backward(*[as_array(tensor) for tensor in tensors], pieces)
    return grad_coef_NSK.sum(dim=1), grad_affine_2KC


# The operators


@torch.library.custom_op("fastcifar_kernels::bn_relu_weighted_sum", mutates_args=())
def _bn_relu_weighted_sum(
    y_NKCHW: Tensor,
    coef_NK: Tensor,
    mean_KC: Tensor,
    variance_KC: Tensor,
    weight_KC: Tensor,
    bias_KC: Tensor,
    residual_NCHW: Tensor | None,
    eps: float,
    use_batch: bool,
) -> Tensor:
    if computes_in_float32(y_NKCHW):
        residual_NCHW = None if residual_NCHW is None else residual_NCHW.float()
        rest = coef_NK, mean_KC, variance_KC, weight_KC, bias_KC, residual_NCHW, eps, use_batch
        return _bn_relu_weighted_sum(y_NKCHW.float(), *rest).to(y_NKCHW.dtype)
    out_NCHW = empty_map(y_NKCHW)
    if out_NCHW.numel():
        forward = _triton_forward if runs_triton(y_NKCHW) else _cpu_forward
        affine = [tensor.contiguous() for tensor in (mean_KC, variance_KC, weight_KC, bias_KC)]
        with torch.cuda.device_of(y_NKCHW):
            forward(y_NKCHW, coef_NK.contiguous(), affine, residual_NCHW, eps, out_NCHW)
    return out_NCHW


@torch.library.custom_op("fastcifar_kernels::bn_relu_weighted_sum_backward", mutates_args=())
def _bn_relu_weighted_sum_backward(
    y_NKCHW: Tensor,
    coef_NK: Tensor,
    mean_KC: Tensor,
    variance_KC: Tensor,
    weight_KC: Tensor,
    bias_KC: Tensor,
    grad_NCHW: Tensor,
    eps: float,
    use_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y, of the coefficients, and of bias and weight as one [2, K, C]."""
    if computes_in_float32(y_NKCHW):
        rest = coef_NK, mean_KC, variance_KC, weight_KC, bias_KC, grad_NCHW.float(), eps, use_batch
        grad_y_NKCHW, grad_coef_NK, grad_affine_2KC = _bn_relu_weighted_sum_backward(y_NKCHW.float(), *rest)
        return grad_y_NKCHW.to(y_NKCHW.dtype), grad_coef_NK, grad_affine_2KC
    grad_y_NKCHW = empty_experts(y_NKCHW)
    if not grad_y_NKCHW.numel():
        return grad_y_NKCHW, torch.zeros_like(coef_NK), torch.zeros((2, *mean_KC.shape), device=mean_KC.device)
    backward = _triton_backward if runs_triton(y_NKCHW) else _cpu_backward
    affine = [tensor.contiguous() for tensor in (mean_KC, variance_KC, weight_KC, bias_KC)]
    with torch.cuda.device_of(y_NKCHW):
        rest = backward(y_NKCHW, coef_NK.contiguous(), affine, grad_NCHW, eps, use_batch, grad_y_NKCHW)
    return grad_y_NKCHW, *rest


@_bn_relu_weighted_sum.register_fake
def _(y_NKCHW, coef_NK, mean_KC, variance_KC, weight_KC, bias_KC, residual_NCHW, eps, use_batch):
    return empty_map(y_NKCHW)


@_bn_relu_weighted_sum_backward.register_fake
def _(y_NKCHW, coef_NK, mean_KC, variance_KC, weight_KC, bias_KC, grad_NCHW, eps, use_batch):
    grad_affine_2KC = torch.empty((2, *mean_KC.shape), device=mean_KC.device)
    return empty_experts(y_NKCHW), torch.empty(coef_NK.shape, device=coef_NK.device), grad_affine_2KC


def _save(ctx, inputs, output) -> None:
    *tensors, residual_NCHW, eps, use_batch = inputs
    ctx.save_for_backward(*tensors)
    ctx.residual, ctx.eps, ctx.use_batch = residual_NCHW is not None, eps, use_batch


def _gradients(ctx, grad_NCHW: Tensor):
    rest = grad_NCHW, ctx.eps, ctx.use_batch
    grad_y_NKCHW, grad_coef_NK, grad_affine_2KC = _bn_relu_weighted_sum_backward(*ctx.saved_tensors, *rest)
    grad_bias_KC, grad_weight_KC = grad_affine_2KC.unbind()
    grad_residual_NCHW = grad_NCHW if ctx.residual else None
    return grad_y_NKCHW, grad_coef_NK, None, None, grad_weight_KC, grad_bias_KC, grad_residual_NCHW, None, None


_bn_relu_weighted_sum.register_autograd(_gradients, setup_context=_save)
