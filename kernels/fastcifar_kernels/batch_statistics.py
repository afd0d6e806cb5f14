"""Mean and variance of each channel of each expert over a batch, in one pass: what BatchNorm normalises with.

Traffic in units of N * P * C elements: reads K. Each thread keeps the mean and the sum of squared deviations of what it
has seen (Welford, 1962), and the parts are merged exactly (Chan, Golub and LeVeque, 1979): no difference of two large
sums, so a mean far larger than the deviation costs no precision.
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

from fastcifar_kernels.layout import as_rows, check_stack, check_values, computes_in_float32, runs_triton
from fastcifar_kernels.loops import PIECE_PIXELS, as_array, pieces_of, widen
from fastcifar_kernels.tiles import bounds, cut, place, walk

MERGED_AT_ONCE = 128  # shares of programs, in one tile: few columns mean few programs, so each takes many rows


def batch_statistics_reference(y_NKCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch: the truth the kernels are held to."""
    at_least_float32 = torch.promote_types(y_NKCHW.dtype, torch.float32)
    variance_KC, mean_KC = torch.var_mean(y_NKCHW.to(at_least_float32), dim=(0, 3, 4), correction=0)
    return mean_KC, variance_KC


def batch_statistics(y_NKCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance over N, H and W. Not differentiable: gradients stop here.

    Args:
        y_NKCHW: float32, bfloat16 or float16; fastest channels-last (see `weighted_sum`).

    Returns:
        mean [K, C] and variance [K, C], float32.

    Raises:
        ValueError: a type without kernels, no values to take the mean of, or one sample of 2**31 elements or more.
    """
    check_values("y_NKCHW", y_NKCHW, 5)
    check_stack("y_NKCHW", y_NKCHW, y_NKCHW.size(1))
    if not y_NKCHW.numel():
        raise ValueError(f"y_NKCHW has no values to take the mean of: its shape is {tuple(y_NKCHW.shape)}.")
    return _batch_statistics(y_NKCHW.detach())


# Triton


@triton.jit
def _batch_statistics_kernel(
    y_ptr, count_ptr, mean_ptr, square_ptr,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program's share: its number of values and, per channel, their mean and sum of squared deviations."""
    k = tl.program_id(0)
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    first, end = walk(all_pieces, pieces_per_program)
    count_P1 = tl.zeros((BLOCK_P, 1), tl.float32)
    mean_PC = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square_PC = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            y_PC = tl.load(y_ptr + n * y_stride_n + p * y_stride_p + k * y_stride_k + c_1C, inside, 0)
            count_P1 += (p < pixels).to(tl.float32)
            deviation_PC = y_PC - mean_PC
            mean_PC += tl.where(p < pixels, deviation_PC / tl.maximum(count_P1, 1), 0)
            square_PC += tl.where(p < pixels, deviation_PC * (y_PC - mean_PC), 0)
    count = tl.sum(count_P1)
    mean_1C = tl.sum(mean_PC * count_P1, axis=0, keep_dims=True) / count
    deviation_PC = mean_PC - mean_1C
    square_1C = tl.sum(square_PC + count_P1 * deviation_PC * deviation_PC, axis=0, keep_dims=True)
    at_1C = (tl.program_id(2) * EXPERTS + k) * channels + c_1C
    tl.store(mean_ptr + at_1C, mean_1C, c_1C < channels)
    tl.store(square_ptr + at_1C, square_1C, c_1C < channels)
    tl.store(count_ptr + tl.program_id(2), count)


@triton.jit
def _merge_kernel(
    count_ptr, mean_ptr, square_ptr, out_mean_ptr, out_variance_ptr,
    splits, columns, values,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge the shares of all programs: [S, K * C] to [K * C]."""
    s_S1 = tl.arange(0, BLOCK_S)[:, None]
    c_1C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mean_SC = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for s0 in range(0, splits, BLOCK_S):
        s = s0 + s_S1
        count_S1 = tl.load(count_ptr + s, s < splits, 0)
        mean_SC += count_S1 / values * tl.load(mean_ptr + s * columns + c_1C, (s < splits) & (c_1C < columns), 0)
    mean_1C = tl.sum(mean_SC, axis=0, keep_dims=True)
    square_SC = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for s0 in range(0, splits, BLOCK_S):
        s = s0 + s_S1
        inside = (s < splits) & (c_1C < columns)
        count_S1 = tl.load(count_ptr + s, s < splits, 0)
        deviation_SC = tl.load(mean_ptr + s * columns + c_1C, inside, 0) - mean_1C
        square_SC += tl.load(square_ptr + s * columns + c_1C, inside, 0) + count_S1 * deviation_SC * deviation_SC
    tl.store(out_mean_ptr + c_1C, mean_1C, c_1C < columns)
    tl.store(out_variance_ptr + c_1C, tl.sum(square_SC, axis=0, keep_dims=True) / values, c_1C < columns)


def _triton_statistics(y_NKCHW: Tensor, mean_KC: Tensor, variance_KC: Tensor) -> None:
    y_NPKC = as_rows(y_NKCHW)
    n, p, k, c = y_NPKC.shape
    work = cut(y_NPKC, experts_at_once=1)
    count_S = torch.empty((work.splits,), device=y_NPKC.device)
    mean_SKC = torch.empty((work.splits, k, c), device=y_NPKC.device)
    square_SKC = torch.empty((work.splits, k, c), device=y_NPKC.device)
    _batch_statistics_kernel[work.grid](y_NPKC, count_S, mean_SKC, square_SKC, **work.sizes)
    # 32 columns of float32 are a full 128-byte line.
    _merge_kernel[(triton.cdiv(k * c, 32),)](
        count_S, mean_SKC, square_SKC, mean_KC, variance_KC, work.splits, k * c, float(n * p),
        BLOCK_S=MERGED_AT_ONCE, BLOCK_C=32, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


# numba


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_statistics(y_NPKC, count_S, mean_SKC, square_SKC, pieces):  # pragma: no cover
    """Each piece's mean and sum of squared deviations; the second pass finds the piece in the core's own cache."""
    pixels, experts, channels = y_NPKC.shape[1:]
    for piece in numba.prange(len(y_NPKC) * pieces):
        n, start = piece // pieces, piece % pieces * PIECE_PIXELS
        stop = min(start + PIECE_PIXELS, pixels)
        count_S[piece] = stop - start
        sum_KC = np.zeros((experts, channels), np.float32)
        for p in range(start, stop):
            for k in range(experts):
                for c in range(channels):
                    sum_KC[k, c] += widen(y_NPKC[n, p, k, c])
        for k in range(experts):
            for c in range(channels):
                mean_SKC[piece, k, c] = sum_KC[k, c] / np.float32(stop - start)
                sum_KC[k, c] = 0
        for p in range(start, stop):
            for k in range(experts):
                for c in range(channels):
                    deviation = widen(y_NPKC[n, p, k, c]) - mean_SKC[piece, k, c]
                    sum_KC[k, c] += deviation * deviation
        for k in range(experts):
            for c in range(channels):
                square_SKC[piece, k, c] = sum_KC[k, c]


def _cpu_statistics(y_NKCHW: Tensor, mean_KC: Tensor, variance_KC: Tensor) -> None:
    y_NPKC = as_rows(y_NKCHW).contiguous()
    n, p, k, c = y_NPKC.shape
    pieces = pieces_of(p)
    count_S = torch.empty((n * pieces,))
    mean_SKC, square_SKC = torch.empty((n * pieces, k, c)), torch.empty((n * pieces, k, c))
    _numba_statistics(*[as_array(tensor) for tensor in (y_NPKC, count_S, mean_SKC, square_SKC)], pieces)
    count_S11 = count_S[:, None, None]
    torch.sum(mean_SKC * (count_S11 / (n * p)), dim=0, out=mean_KC)
    deviation_SKC = mean_SKC - mean_KC
    torch.sum((square_SKC + count_S11 * deviation_SKC * deviation_SKC) / (n * p), dim=0, out=variance_KC)


# The operator


@torch.library.custom_op("fastcifar_kernels::batch_statistics", mutates_args=())
def _batch_statistics(y_NKCHW: Tensor) -> tuple[Tensor, Tensor]:
    if computes_in_float32(y_NKCHW):
        return _batch_statistics(y_NKCHW.float())
    mean_KC, variance_KC = _empty_statistics(y_NKCHW)
    with torch.cuda.device_of(y_NKCHW):
        (_triton_statistics if runs_triton(y_NKCHW) else _cpu_statistics)(y_NKCHW, mean_KC, variance_KC)
    return mean_KC, variance_KC


@_batch_statistics.register_fake
def _empty_statistics(y_NKCHW: Tensor) -> tuple[Tensor, Tensor]:
    size, device = tuple(y_NKCHW.shape[1:3]), y_NKCHW.device
    return torch.empty(size, device=device), torch.empty(size, device=device)
