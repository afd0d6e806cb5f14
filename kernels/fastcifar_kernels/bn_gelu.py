"""out = gelu(batch_norm(x)) where channels are the last axis, in one pass; BatchNorm has a bias, no scale.

Traffic in units of the tensor. Forward reads 1 for the batch statistics (none in eval mode) and 1 more, and writes 1:
in bfloat16 6 bytes an element. Backward on a GPU reads 2 (x and the gradient) for the two sums, reads them again and
writes 1: 10 bytes. On a CPU it reads 2, writes h over the gradient to be, reads 2 (x and h) and writes 1: to compute h
again instead would save a write, and takes longer. Kept from forward to backward is the input alone.

With z = x - mean, scale = 1 / std, u = scale * z + bias, and h = gelu'(u) * grad:
    grad of bias = sum of h      grad of x = scale * (h - mean of h - scale**2 * z * mean of h * z)
in eval mode grad of x = scale * h.

With Phi, the normal distribution function, gelu(u) = u * Phi(u) and gelu'(u) = Phi(u) + u * Phi'(u). The Triton kernels
take Phi from erf, as PyTorch does. In the loops Phi and gelu' are 0.5 + t * polynomial(t**2) with t = u cut off at
+-CUT: 9 multiplications and additions instead of an exponential and a division. Phi is off by at most 1.4e-5 there, and
gelu' by 4.8e-4, where bfloat16 is off by 4e-3 of a value.

Shapes: R rows (everything but the channels), C channels; for the Triton kernels the rows are P pixels of N samples.
"""

# numba and triton change what their decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import math

import numba
import numpy as np
import torch
import triton
import triton.language as tl
from numpy.polynomial import chebyshev
from torch import Tensor
from torch.nn import functional as F

from fastcifar_kernels.batch_statistics import batch_statistics
from fastcifar_kernels.layout import (
    SPAN_LIMIT,
    check_companion,
    check_dtype,
    check_stack,
    computes_in_float32,
    runs_triton,
)
from fastcifar_kernels.loops import as_array, narrow, use_wide_vectors, widen
from fastcifar_kernels.tiles import bounds, cut, place, walk

CUT = 4.1
DEGREE = 8
PIECE_ROWS = 1024  # handled by one thread at a time


def bn_gelu_reference(
    x_RC: Tensor,
    bias_C: Tensor,
    running_mean_C: Tensor,
    running_var_C: Tensor,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The same in plain torch: the truth the kernels are held to."""
    rows = x_RC.flatten(0, -2)
    out = F.batch_norm(rows, running_mean_C, running_var_C, None, bias_C, training, momentum, eps)
    return F.gelu(out).view_as(x_RC)


def bn_gelu(
    x_RC: Tensor,
    bias_C: Tensor,
    running_mean_C: Tensor,
    running_var_C: Tensor,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """GELU of normalised channels.

    Args:
        x_RC: [..., C], float32, bfloat16 or float16; fastest contiguous, as `x_NCHW.permute(0, 2, 3, 1)` of a
            channels-last map is. Any other layout is copied first.
        bias_C: of any of these types; used as float32.
        running_mean_C, running_var_C: updated in place in training, used otherwise.
        training: normalise with the statistics of this batch; else with the running ones.
        momentum: share of this batch in the running statistics, as in torch.nn.BatchNorm2d.
        eps: added to the variance.

    Returns:
        Of the shape and type of `x_RC`, contiguous.

    Raises:
        ValueError: shapes, types or devices do not belong together; fewer than two values a channel to train on; one
            sample (what the first of three axes or more counts) has 2**31 elements or more.
    """
    check_dtype("x_RC", x_RC.dtype)
    if x_RC.dim() < 2:
        raise ValueError(f"x_RC must have at least 2 dimensions, has shape {tuple(x_RC.shape)}.")
    given = {"bias_C": bias_C, "running_mean_C": running_mean_C, "running_var_C": running_var_C}
    for name, tensor in given.items():
        check_companion(name, tensor, tuple(x_RC.shape[-1:]), "x_RC", x_RC)
    check_stack("x_RC", x_RC if x_RC.dim() > 2 else x_RC[None], experts=1)
    if training and x_RC.numel() < 2 * max(1, x_RC.size(-1)):
        raise ValueError(f"training needs at least two values per channel, x_RC has shape {tuple(x_RC.shape)}.")
    if not x_RC.numel():
        how = {"training": training, "momentum": momentum, "eps": eps}
        return bn_gelu_reference(x_RC, bias_C, running_mean_C, running_var_C, **how)
    mean_C, variance_C = running_mean_C, running_var_C
    if training:
        mean_1C, variance_1C = batch_statistics(_samples(x_RC.detach()).transpose(1, 2)[:, None, :, :, None])
        mean_C, variance_C = mean_1C[0], variance_1C[0]
        count = x_RC.numel() // x_RC.size(-1)
        running_mean_C.lerp_(mean_C.to(running_mean_C.dtype), momentum)
        running_var_C.lerp_((variance_C * (count / (count - 1))).to(running_var_C.dtype), momentum)
    return _bn_gelu(x_RC, mean_C.float(), variance_C.float(), bias_C.float(), eps, training)


def _samples(x_RC: Tensor) -> Tensor:
    """[N, P, C].

    On a GPU one sample, so that no tile ends with an image: of a map of 3 x 3 pixels, two tiles would be half empty.
    """
    if x_RC.dim() == 2 or (x_RC.device.type != "cpu" and x_RC.numel() < SPAN_LIMIT):
        return x_RC.flatten(0, -2)[None]
    return x_RC.flatten(1, -2)


# Triton


@triton.jit
def _affine(mean_ptr, variance_ptr, bias_ptr, c_1C, channels, eps):
    """mean, scale and bias of some channels."""
    mask = c_1C < channels
    scale_1C = 1 / tl.sqrt_rn(tl.load(variance_ptr + c_1C, mask, 0) + eps)
    return tl.load(mean_ptr + c_1C, mask, 0), scale_1C, tl.load(bias_ptr + c_1C, mask, 0)


@triton.jit
def _phi(u_PC):
    """The share of a normal distribution below u."""
    return 0.5 + 0.5 * tl.erf(u_PC * 0.7071067811865476)  # 1 / sqrt(2)


@triton.jit
def _slope(u_PC):
    """GELU's derivative."""
    return _phi(u_PC) + u_PC * 0.3989422804014327 * tl.exp(-0.5 * u_PC * u_PC)  # 1 / sqrt(2 * pi)


@triton.jit
def _bn_gelu_fwd_kernel(
    x_ptr, mean_ptr, variance_ptr, bias_ptr, out_ptr, eps,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    mean_1C, scale_1C, bias_1C = _affine(mean_ptr, variance_ptr, bias_ptr, c_1C, channels, eps)
    first, end = walk(all_pieces, pieces_per_program)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            at_PC = n * pixels * channels + p * channels + c_1C
            u_PC = scale_1C * (tl.load(x_ptr + at_PC, inside, 0) - mean_1C) + bias_1C
            tl.store(out_ptr + at_PC, u_PC * _phi(u_PC), inside)


@triton.jit
def _bn_gelu_sums_kernel(
    x_ptr, mean_ptr, variance_ptr, bias_ptr, grad_ptr, sums_ptr, eps,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program's share of the sums of h and of h * z: [S, 2, C]."""
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    mean_1C, scale_1C, bias_1C = _affine(mean_ptr, variance_ptr, bias_ptr, c_1C, channels, eps)
    sum_PC = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    product_PC = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first, end = walk(all_pieces, pieces_per_program)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            at_PC = n * pixels * channels + p * channels + c_1C
            z_PC = tl.load(x_ptr + at_PC, inside, 0) - mean_1C
            # Beyond the end the gradient is 0, and so is what is added.
            h_PC = _slope(scale_1C * z_PC + bias_1C) * tl.load(grad_ptr + at_PC, inside, 0)
            sum_PC += h_PC
            product_PC += h_PC * z_PC
    at_1C = tl.program_id(2) * 2 * channels + c_1C
    tl.store(sums_ptr + at_1C, tl.sum(sum_PC, axis=0, keep_dims=True), c_1C < channels)
    tl.store(sums_ptr + at_1C + channels, tl.sum(product_PC, axis=0, keep_dims=True), c_1C < channels)


@triton.jit
def _bn_gelu_bwd_kernel(
    x_ptr, mean_ptr, variance_ptr, bias_ptr, grad_ptr, sums_ptr, grad_x_ptr, eps, values,
    pixels, channels, y_stride_n, y_stride_p, y_stride_k, pieces, piece_pixels, all_pieces, pieces_per_program,
    BATCH_STATISTICS: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of x, given the sums of h and of h * z."""
    p_P1, c_1C = place(BLOCK_P, BLOCK_C)
    mean_1C, scale_1C, bias_1C = _affine(mean_ptr, variance_ptr, bias_ptr, c_1C, channels, eps)
    if BATCH_STATISTICS:  # what the batch's mean and deviation pass back is level + tilt * z
        level_1C = scale_1C * tl.load(sums_ptr + c_1C, c_1C < channels, 0) / values
        product_1C = tl.load(sums_ptr + channels + c_1C, c_1C < channels, 0)
        tilt_1C = scale_1C * scale_1C * scale_1C * product_1C / values
    first, end = walk(all_pieces, pieces_per_program)
    for piece in range(first, end):
        n, start, stop = bounds(piece, pieces, piece_pixels, pixels)
        for p0 in range(start, stop, BLOCK_P):
            p = p0 + p_P1
            inside = (p < pixels) & (c_1C < channels)
            at_PC = n * pixels * channels + p * channels + c_1C
            z_PC = tl.load(x_ptr + at_PC, inside, 0) - mean_1C
            h_PC = _slope(scale_1C * z_PC + bias_1C) * tl.load(grad_ptr + at_PC, inside, 0)
            grad_x_PC = scale_1C * h_PC
            if BATCH_STATISTICS:
                grad_x_PC -= level_1C + tilt_1C * z_PC
            tl.store(grad_x_ptr + at_PC, grad_x_PC, inside)


def _triton_forward(x_RC: Tensor, norm: tuple[Tensor, Tensor, Tensor], eps: float, out_RC: Tensor) -> None:
    x_NPC = _samples(x_RC)
    work = cut(x_NPC[:, :, None], experts_at_once=1)
    _bn_gelu_fwd_kernel[work.grid](x_NPC, *norm, out_RC, eps, **work.sizes)


def _triton_backward(
    x_RC: Tensor, norm: tuple[Tensor, Tensor, Tensor], grad_RC: Tensor, eps: float, use_batch: bool, grad_x_RC: Tensor
) -> Tensor:
    x_NPC = _samples(x_RC)
    n, p, c = x_NPC.shape
    work = cut(x_NPC[:, :, None], experts_at_once=1)
    sums_S2C = torch.empty((work.splits, 2, c), device=x_NPC.device)
    _bn_gelu_sums_kernel[work.grid](x_NPC, *norm, grad_RC, sums_S2C, eps, **work.sizes)
    sums_2C = sums_S2C.sum(dim=0)
    _bn_gelu_bwd_kernel[work.grid](
        x_NPC, *norm, grad_RC, sums_2C, grad_x_RC, eps, float(n * p), BATCH_STATISTICS=use_batch, **work.sizes
    )
    return sums_2C[0]


# numba


def _fit(function) -> tuple[np.float32, ...]:
    """Coefficients of p, lowest first, with function(t) = 0.5 + t * p(t**2) up to CUT: Chebyshev's interpolation."""
    series = chebyshev.Chebyshev.interpolate(
        np.vectorize(lambda s: (function(math.sqrt(s)) - 0.5) / math.sqrt(s)), DEGREE, [1e-9, CUT**2]
    )
    return tuple(np.float32(c) for c in series.convert(kind=np.polynomial.Polynomial).coef)


def _phi_of(t: float) -> float:
    return 0.5 * (1 + math.erf(t / math.sqrt(2)))


PHI = _fit(_phi_of)
SLOPE = _fit(lambda t: _phi_of(t) + t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi))


@numba.njit(cache=True, forceinline=True, fastmath={"contract"}, error_model="numpy")
def _curve(u, p):  # pragma: no cover
    """0.5 + t * p(t**2) with t = u cut off."""
    t = min(max(u, np.float32(-CUT)), np.float32(CUT))
    s = t * t
    value = p[7] + s * p[8]
    value = p[6] + s * value
    value = p[5] + s * value
    value = p[4] + s * value
    value = p[3] + s * value
    value = p[2] + s * value
    value = p[1] + s * value
    value = p[0] + s * value
    return np.float32(0.5) + t * value


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_forward(x_RC, mean_C, scale_C, bias_C, out_RC):  # pragma: no cover
    rows, channels = x_RC.shape
    for piece in numba.prange(-(-rows // PIECE_ROWS)):
        use_wide_vectors()
        for r in range(piece * PIECE_ROWS, min(rows, (piece + 1) * PIECE_ROWS)):
            for c in range(channels):
                u = scale_C[c] * (widen(x_RC[r, c]) - mean_C[c]) + bias_C[c]
                out_RC[r, c] = narrow(u * _curve(u, PHI), out_RC[r, c])


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_sums(x_RC, mean_C, scale_C, bias_C, grad_RC, h_RC, sums_2PC):  # pragma: no cover
    """h, and each piece's sums of h and of h * z."""
    rows, channels = x_RC.shape
    for piece in numba.prange(-(-rows // PIECE_ROWS)):
        use_wide_vectors()
        sum_C, product_C = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
        for r in range(piece * PIECE_ROWS, min(rows, (piece + 1) * PIECE_ROWS)):
            for c in range(channels):
                z = widen(x_RC[r, c]) - mean_C[c]
                h = _curve(scale_C[c] * z + bias_C[c], SLOPE) * widen(grad_RC[r, c])
                h_RC[r, c] = narrow(h, h_RC[r, c])
                h = widen(h_RC[r, c])  # sums of other values would not cancel what they should
                sum_C[c] += h
                product_C[c] += h * z
        sums_2PC[0, piece] = sum_C
        sums_2PC[1, piece] = product_C


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _numba_backward(x_RC, mean_C, scale_C, level_C, tilt_C, grad_x_RC):  # pragma: no cover
    """Makes h the gradient of x; what the batch's mean and deviation pass back is level + tilt * z."""
    rows, channels = x_RC.shape
    for piece in numba.prange(-(-rows // PIECE_ROWS)):
        use_wide_vectors()
        for r in range(piece * PIECE_ROWS, min(rows, (piece + 1) * PIECE_ROWS)):
            for c in range(channels):
                z = widen(x_RC[r, c]) - mean_C[c]
                value = scale_C[c] * widen(grad_x_RC[r, c]) - (level_C[c] + tilt_C[c] * z)
                grad_x_RC[r, c] = narrow(value, grad_x_RC[r, c])


def _arrays(x_RC: Tensor, norm: tuple[Tensor, Tensor, Tensor], eps: float) -> list:
    """x, mean, scale and bias as the loops take them."""
    mean_C, variance_C, bias_C = norm
    tensors = x_RC.flatten(0, -2), mean_C, (variance_C + eps).rsqrt(), bias_C
    return [as_array(tensor) for tensor in tensors]


def _cpu_forward(x_RC: Tensor, norm: tuple[Tensor, Tensor, Tensor], eps: float, out_RC: Tensor) -> None:
    _numba_forward(*_arrays(x_RC, norm, eps), as_array(out_RC.flatten(0, -2)))


def _cpu_backward(
    x_RC: Tensor, norm: tuple[Tensor, Tensor, Tensor], grad_RC: Tensor, eps: float, use_batch: bool, grad_x_RC: Tensor
) -> Tensor:
    arrays, h = _arrays(x_RC, norm, eps), as_array(grad_x_RC.flatten(0, -2))
    rows, channels = arrays[0].shape
    sums_2PC = torch.empty((2, -(-rows // PIECE_ROWS), channels))
    _numba_sums(*arrays, as_array(grad_RC.flatten(0, -2)), h, as_array(sums_2PC))
    grad_bias_C, product_C = sums_2PC.sum(dim=1)
    level_C = tilt_C = torch.zeros(channels)
    if use_batch:
        scale_C = (norm[1] + eps).rsqrt()
        level_C, tilt_C = scale_C * grad_bias_C / rows, scale_C**3 * product_C / rows
    _numba_backward(*arrays[:3], as_array(level_C), as_array(tilt_C), h)
    return grad_bias_C


# The operators


@torch.library.custom_op("fastcifar_kernels::bn_gelu", mutates_args=())
def _bn_gelu(x_RC: Tensor, mean_C: Tensor, variance_C: Tensor, bias_C: Tensor, eps: float, use_batch: bool) -> Tensor:
    if computes_in_float32(x_RC):
        return _bn_gelu(x_RC.float(), mean_C, variance_C, bias_C, eps, use_batch).to(x_RC.dtype)
    out_RC = torch.empty(x_RC.shape, dtype=x_RC.dtype, device=x_RC.device)
    norm = mean_C.contiguous(), variance_C.contiguous(), bias_C.contiguous()
    with torch.cuda.device_of(x_RC):
        (_triton_forward if runs_triton(x_RC) else _cpu_forward)(x_RC.contiguous(), norm, eps, out_RC)
    return out_RC


@torch.library.custom_op("fastcifar_kernels::bn_gelu_backward", mutates_args=())
def _bn_gelu_backward(
    x_RC: Tensor, mean_C: Tensor, variance_C: Tensor, bias_C: Tensor, grad_RC: Tensor, eps: float, use_batch: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and bias."""
    if computes_in_float32(x_RC):
        rest = mean_C, variance_C, bias_C, grad_RC.float(), eps, use_batch
        grad_x_RC, grad_bias_C = _bn_gelu_backward(x_RC.float(), *rest)
        return grad_x_RC.to(x_RC.dtype), grad_bias_C
    grad_x_RC = torch.empty(x_RC.shape, dtype=x_RC.dtype, device=x_RC.device)
    norm = mean_C.contiguous(), variance_C.contiguous(), bias_C.contiguous()
    backward = _triton_backward if runs_triton(x_RC) else _cpu_backward
    with torch.cuda.device_of(x_RC):
        return grad_x_RC, backward(x_RC.contiguous(), norm, grad_RC.contiguous(), eps, use_batch, grad_x_RC)


@_bn_gelu.register_fake
def _(x_RC, mean_C, variance_C, bias_C, eps, use_batch):
    return x_RC.new_empty(x_RC.shape)


@_bn_gelu_backward.register_fake
def _(x_RC, mean_C, variance_C, bias_C, grad_RC, eps, use_batch):
    return x_RC.new_empty(x_RC.shape), torch.empty_like(bias_C)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.use_batch = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad_RC: Tensor):
    grad_x_RC, grad_bias_C = _bn_gelu_backward(*ctx.saved_tensors, grad_RC, ctx.eps, ctx.use_batch)
    return grad_x_RC, None, None, grad_bias_C, None, None


_bn_gelu.register_autograd(_gradients, setup_context=_save)
