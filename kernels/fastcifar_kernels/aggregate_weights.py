"""out[n] = sum over k of coef[n, k] * w[k]: filters of each sample's own, for one convolution instead of K.

(CondConv, arXiv:1904.04971; dynamic convolution, arXiv:1912.03458.) The result feeds a grouped convolution, a group for
each sample.

Traffic in units of M = O * I * H * W elements: forward reads K and writes N; backward reads K + N and writes K (in
float32). The gradients of filters and coefficients need the same N * M elements, so one kernel reads them for both.
"""

# triton changes what its decorator wraps:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcifar_kernels.layout import check_companion, check_dtype, check_stack, check_values, runs_triton
from fastcifar_kernels.tiles import THREAD_BYTES, experts_of_program

WARPS = 4
PROGRAMS = 1024
EXPERTS_AT_ONCE = 4  # in the backward kernel, whose threads keep filters and their gradients in registers


def aggregate_weights_reference(w_KOIHW: Tensor, coef_NK: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same in plain torch: the truth the kernels are held to."""
    return torch.einsum("nk,koihw->noihw", coef_NK.to(w_KOIHW.dtype), w_KOIHW).to(dtype or w_KOIHW.dtype)


def aggregate_weights(w_KOIHW: Tensor, coef_NK: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sum K sets of filters with coefficients of each sample.

    Args:
        w_KOIHW: float32, bfloat16 or float16.
        coef_NK: any of these types; used as float32.
        dtype: the type of the result, that of `w_KOIHW` if not given: float32 filters need no pass of their own to
            become bfloat16.

    Returns:
        [N, O, I, H, W]; channels-last filters if those of `w_KOIHW` are, else contiguous.

    Raises:
        ValueError: shapes, types or devices do not belong together, or one set of filters has 2**31 elements or more.
    """
    check_values("w_KOIHW", w_KOIHW, 5)
    check_stack("w_KOIHW", w_KOIHW, w_KOIHW.size(0))
    check_values("coef_NK", coef_NK, 2)
    check_companion("coef_NK", coef_NK, (coef_NK.size(0), w_KOIHW.size(0)), "w_KOIHW", w_KOIHW)
    check_dtype("dtype", dtype or w_KOIHW.dtype)
    return _aggregate_weights(w_KOIHW, coef_NK.float(), dtype or w_KOIHW.dtype)


# Both sides see filters as rows [K, M]. Which element of a filter is where does not matter, only that it is the same
# everywhere.


def _channels_last(w_KOIHW: Tensor) -> bool:
    return not w_KOIHW.is_contiguous() and w_KOIHW.permute(0, 1, 3, 4, 2).is_contiguous()


def _empty(samples: int, w_KOIHW: Tensor, dtype: torch.dtype) -> Tensor:
    """An unwritten [N, O, I, H, W] whose filters lie as those of `w_KOIHW`."""
    _, o, i, h, w = w_KOIHW.shape
    if _channels_last(w_KOIHW):
        return torch.empty((samples, o, h, w, i), dtype=dtype, device=w_KOIHW.device).permute(0, 1, 4, 2, 3)
    return torch.empty((samples, o, i, h, w), dtype=dtype, device=w_KOIHW.device)


def _as_rows(any_KOIHW: Tensor, like_KOIHW: Tensor) -> Tensor:
    """[K, M], its elements in the order of `like_KOIHW`."""
    lying = any_KOIHW.permute(0, 1, 3, 4, 2) if _channels_last(like_KOIHW) else any_KOIHW
    return lying.contiguous().view(len(any_KOIHW), -1)


# Triton


@triton.jit
def _aggregate_weights_fwd_kernel(
    w_ptr, coef_ptr, out_ptr, samples, size, samples_per_program,
    EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    m_1M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    filters = ()
    for k in tl.static_range(EXPERTS):
        filters += (tl.load(w_ptr + k * size.to(tl.int64) + m_1M, m_1M < size, 0),)
    first = tl.program_id(1) * samples_per_program
    for n0 in range(first, tl.minimum(first + samples_per_program, samples), BLOCK_N):
        n_N1 = n0 + tl.arange(0, BLOCK_N)[:, None]
        out_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in tl.static_range(EXPERTS):
            out_NM += tl.load(coef_ptr + n_N1 * EXPERTS + k, n_N1 < samples, 0) * filters[k]
        tl.store(out_ptr + n_N1.to(tl.int64) * size + m_1M, out_NM, (n_N1 < samples) & (m_1M < size))


@triton.jit
def _aggregate_weights_bwd_kernel(
    w_ptr, coef_ptr, grad_ptr, grad_w_ptr, grad_coef_ptr, samples, size, samples_per_program,
    EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    k0 = tl.program_id(2) * BLOCK_K
    m_1M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    filters = ()
    sums = ()  # of coef * grad, for each expert
    for i in tl.static_range(BLOCK_K):
        filters += (tl.load(w_ptr + (k0 + i) * size.to(tl.int64) + m_1M, m_1M < size, 0).to(tl.float32),)
        sums += (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),)
    first = tl.program_id(1) * samples_per_program
    for n0 in range(first, tl.minimum(first + samples_per_program, samples), BLOCK_N):
        n_N1 = n0 + tl.arange(0, BLOCK_N)[:, None]
        inside = (n_N1 < samples) & (m_1M < size)
        grad_NM = tl.load(grad_ptr + n_N1.to(tl.int64) * size + m_1M, inside, 0).to(tl.float32)
        part_N1 = (tl.program_id(0).to(tl.int64) * samples + n_N1) * EXPERTS
        so_far = ()
        for i in tl.static_range(BLOCK_K):
            coef_N1 = tl.load(coef_ptr + n_N1 * EXPERTS + k0 + i, n_N1 < samples, 0)
            so_far += (sums[i] + coef_N1 * grad_NM,)
            dot_N1 = tl.sum(grad_NM * filters[i], axis=1, keep_dims=True)
            tl.store(grad_coef_ptr + part_N1 + k0 + i, dot_N1, n_N1 < samples)
        sums = so_far
    for i in tl.static_range(BLOCK_K):
        at_1M = (tl.program_id(1) * EXPERTS + k0 + i) * size.to(tl.int64) + m_1M
        tl.store(grad_w_ptr + at_1M, tl.sum(sums[i], axis=0, keep_dims=True), m_1M < size)


def _blocks(w_KM: Tensor, rows_NM: Tensor, experts_at_once: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Launch grid (elements, samples, experts) and sizes. A warp holds a row of BLOCK_M: sums over M stay inside it."""
    (experts, size), samples = w_KM.shape, len(rows_NM)
    block_m = 32 * THREAD_BYTES // rows_NM.element_size()
    columns = triton.cdiv(size, block_m)
    rounds = triton.cdiv(samples, WARPS)
    block_k = experts_of_program(experts, experts_at_once)
    samples_per_program = triton.cdiv(rounds, triton.cdiv(PROGRAMS, columns * (experts // block_k))) * WARPS
    sizes = {
        "samples": samples,
        "size": size,
        "samples_per_program": samples_per_program,
        "EXPERTS": experts,
        "BLOCK_K": block_k,
        "BLOCK_N": WARPS,
        "BLOCK_M": block_m,
        "num_warps": WARPS,
        "enable_fp_fusion": True,
    }
    return (columns, triton.cdiv(samples, samples_per_program), experts // block_k), sizes


def _triton_forward(w_KM: Tensor, coef_NK: Tensor, out_NM: Tensor) -> None:
    grid, sizes = _blocks(w_KM, out_NM, len(w_KM))
    _aggregate_weights_fwd_kernel[grid](w_KM, coef_NK, out_NM, **sizes)


def _triton_backward(w_KM: Tensor, coef_NK: Tensor, grad_NM: Tensor) -> tuple[Tensor, Tensor]:
    grid, sizes = _blocks(w_KM, grad_NM, EXPERTS_AT_ONCE)
    grad_w_SKM = torch.empty((grid[1], *w_KM.shape), device=w_KM.device)
    grad_coef_SNK = torch.empty((grid[0], *coef_NK.shape), device=w_KM.device)
    _aggregate_weights_bwd_kernel[grid](w_KM, coef_NK, grad_NM, grad_w_SKM, grad_coef_SNK, **sizes)
    return grad_w_SKM.sum(dim=0), grad_coef_SNK.sum(dim=0)


# On a CPU both are torch's own matrix products, in float32: as fast as loops written for the purpose, or faster.


def _cpu_forward(w_KM: Tensor, coef_NK: Tensor, out_NM: Tensor) -> None:
    with torch.autocast("cpu", enabled=False):
        out_NM.copy_(coef_NK @ w_KM.float())


def _cpu_backward(w_KM: Tensor, coef_NK: Tensor, grad_NM: Tensor) -> tuple[Tensor, Tensor]:
    grad_NM = grad_NM.float()
    with torch.autocast("cpu", enabled=False):
        return coef_NK.T @ grad_NM, grad_NM @ w_KM.float().T


# The operators


@torch.library.custom_op("fastcifar_kernels::aggregate_weights", mutates_args=())
def _aggregate_weights(w_KOIHW: Tensor, coef_NK: Tensor, dtype: torch.dtype) -> Tensor:
    out_NOIHW = _empty(len(coef_NK), w_KOIHW, dtype)
    if out_NOIHW.numel():
        forward = _triton_forward if runs_triton(w_KOIHW) else _cpu_forward
        with torch.cuda.device_of(w_KOIHW):
            forward(_as_rows(w_KOIHW, w_KOIHW), coef_NK.contiguous(), _as_rows(out_NOIHW, w_KOIHW))
    return out_NOIHW


@torch.library.custom_op("fastcifar_kernels::aggregate_weights_backward", mutates_args=())
def _aggregate_weights_backward(w_KOIHW: Tensor, coef_NK: Tensor, grad_NOIHW: Tensor) -> tuple[Tensor, Tensor]:
    grad_w_KOIHW = _empty(len(w_KOIHW), w_KOIHW, w_KOIHW.dtype)
    if not grad_NOIHW.numel():
        return grad_w_KOIHW.zero_(), torch.zeros(coef_NK.shape, device=coef_NK.device)
    backward = _triton_backward if runs_triton(w_KOIHW) else _cpu_backward
    w_KM, grad_NM = _as_rows(w_KOIHW, w_KOIHW), _as_rows(grad_NOIHW, w_KOIHW)
    with torch.cuda.device_of(w_KOIHW):
        grad_w_KM, grad_coef_NK = backward(w_KM, coef_NK.contiguous(), grad_NM)
    _as_rows(grad_w_KOIHW, w_KOIHW).copy_(grad_w_KM)
    return grad_w_KOIHW, grad_coef_NK


@_aggregate_weights.register_fake
def _(w_KOIHW, coef_NK, dtype):
    return _empty(len(coef_NK), w_KOIHW, dtype)


@_aggregate_weights_backward.register_fake
def _(w_KOIHW, coef_NK, grad_NOIHW):
    return _empty(len(w_KOIHW), w_KOIHW, w_KOIHW.dtype), torch.empty(coef_NK.shape, device=coef_NK.device)


def _save(ctx, inputs, output) -> None:
    w_KOIHW, coef_NK, _ = inputs
    ctx.save_for_backward(w_KOIHW, coef_NK)


def _gradients(ctx, grad_NOIHW: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_aggregate_weights_backward(*ctx.saved_tensors, grad_NOIHW), None


_aggregate_weights.register_autograd(_gradients, setup_context=_save)
