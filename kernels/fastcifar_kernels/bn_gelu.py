"""out = gelu(batch_norm(x)) in one pass over a CPU tensor whose last axis is channels; BatchNorm has a bias, no scale.

Traffic in units of the tensor: forward reads 1 for the batch statistics and 1 more, and writes 1; backward reads 2
(x and the gradient), writes h over the gradient to be, reads 2 (x and h) and writes 1: to compute h again instead would
save a write, and takes longer. Kept from forward to backward is the input alone.

With z = x - mean, scale = 1 / std, u = scale * z + bias, and h = gelu'(u) * grad:
    grad of bias = sum of h      grad of x = scale * (h - mean of h - scale**2 * z * mean of h * z)
in eval mode grad of x = scale * h.

Phi, the normal distribution function in gelu(u) = u * Phi(u), and gelu' are 0.5 + t * polynomial(t**2) with t = u cut
off at +-CUT: 9 multiplications and additions instead of an exponential and a division. Phi is off by at most 1.4e-5 and
gelu' by 4.8e-4, where bfloat16 is off by 4e-3 of a value.

Shapes: R rows (everything but the channels), C channels.
"""

# numba changes what its decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false

import math

import numba
import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor
from torch.nn import functional as F

from fastcifar_kernels.batch_statistics import batch_statistics
from fastcifar_kernels.layout import check_companion, check_dtype
from fastcifar_kernels.loops import as_array, narrow, use_wide_vectors, widen

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
    """The same in plain torch: the truth that the loops are held to."""
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
        x_RC: [..., C], float32, bfloat16 or float16.
        bias_C: of any of these types.
        running_mean_C, running_var_C: updated when training, used otherwise.

    Returns:
        Of the shape and type of `x_RC`.

    Raises:
        ValueError: shapes, types or devices do not belong together; fewer than two values a channel to train on.
    """
    check_dtype("x_RC", x_RC.dtype)
    if x_RC.dim() < 2:
        raise ValueError(f"x_RC must have at least 2 dimensions, has shape {tuple(x_RC.shape)}.")
    given = {"bias_C": bias_C, "running_mean_C": running_mean_C, "running_var_C": running_var_C}
    for name, tensor in given.items():
        check_companion(name, tensor, tuple(x_RC.shape[-1:]), "x_RC", x_RC)
    if training and x_RC.numel() < 2 * max(1, x_RC.size(-1)):
        raise ValueError(f"training needs at least two values per channel, x_RC has shape {tuple(x_RC.shape)}.")
    if x_RC.device.type != "cpu" or x_RC.dtype == torch.float16 or not x_RC.numel():
        how = {"training": training, "momentum": momentum, "eps": eps}
        return bn_gelu_reference(x_RC, bias_C, running_mean_C, running_var_C, **how)
    mean_C, variance_C = running_mean_C, running_var_C
    if training:
        x_NPC = x_RC.detach().flatten(1, -2) if x_RC.dim() > 2 else x_RC.detach()[None]
        mean_1C, variance_1C = batch_statistics(x_NPC.transpose(1, 2)[:, None, :, :, None])
        mean_C, variance_C = mean_1C[0], variance_1C[0]
        count = x_RC.numel() // x_RC.size(-1)
        running_mean_C.lerp_(mean_C.to(running_mean_C.dtype), momentum)
        running_var_C.lerp_((variance_C * (count / (count - 1))).to(running_var_C.dtype), momentum)
    return _bn_gelu(x_RC, mean_C.float(), variance_C.float(), bias_C.float(), eps, training)


def _fit(function) -> tuple[np.float32, ...]:
    """Coefficients of p, lowest first, with function(t) = 0.5 + t * p(t**2) up to CUT: Chebyshev's interpolation."""
    series = chebyshev.Chebyshev.interpolate(
        np.vectorize(lambda s: (function(math.sqrt(s)) - 0.5) / math.sqrt(s)), DEGREE, [1e-9, CUT**2]
    )
    return tuple(np.float32(c) for c in series.convert(kind=np.polynomial.Polynomial).coef)


def _phi(t: float) -> float:
    return 0.5 * (1 + math.erf(t / math.sqrt(2)))


PHI = _fit(_phi)
SLOPE = _fit(lambda t: _phi(t) + t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi))


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
def _forward(x_RC, mean_C, scale_C, bias_C, out_RC):  # pragma: no cover
    rows, channels = x_RC.shape
    for piece in numba.prange(-(-rows // PIECE_ROWS)):
        use_wide_vectors()
        for r in range(piece * PIECE_ROWS, min(rows, (piece + 1) * PIECE_ROWS)):
            for c in range(channels):
                u = scale_C[c] * (widen(x_RC[r, c]) - mean_C[c]) + bias_C[c]
                out_RC[r, c] = narrow(u * _curve(u, PHI), out_RC[r, c])


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _sums(x_RC, mean_C, scale_C, bias_C, grad_RC, h_RC, sums_2PC):  # pragma: no cover
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
def _backward(x_RC, mean_C, scale_C, level_C, tilt_C, grad_x_RC):  # pragma: no cover
    """Makes h the gradient of x; what the batch's mean and deviation pass back is level + tilt * z."""
    rows, channels = x_RC.shape
    for piece in numba.prange(-(-rows // PIECE_ROWS)):
        use_wide_vectors()
        for r in range(piece * PIECE_ROWS, min(rows, (piece + 1) * PIECE_ROWS)):
            for c in range(channels):
                z = widen(x_RC[r, c]) - mean_C[c]
                value = scale_C[c] * widen(grad_x_RC[r, c]) - (level_C[c] + tilt_C[c] * z)
                grad_x_RC[r, c] = narrow(value, grad_x_RC[r, c])


# The operators


def _arrays(x_RC: Tensor, mean_C: Tensor, variance_C: Tensor, bias_C: Tensor, eps: float) -> list:
    """x, mean, scale and bias as the loops take them."""
    tensors = x_RC.flatten(0, -2), mean_C, (variance_C + eps).rsqrt(), bias_C
    return [as_array(tensor.contiguous()) for tensor in tensors]


@torch.library.custom_op("fastcifar_kernels::bn_gelu", mutates_args=())
def _bn_gelu(x_RC: Tensor, mean_C: Tensor, variance_C: Tensor, bias_C: Tensor, eps: float, use_batch: bool) -> Tensor:
    out_RC = torch.empty(x_RC.shape, dtype=x_RC.dtype)
    _forward(*_arrays(x_RC, mean_C, variance_C, bias_C, eps), as_array(out_RC.flatten(0, -2)))
    return out_RC


@torch.library.custom_op("fastcifar_kernels::bn_gelu_backward", mutates_args=())
def _bn_gelu_backward(
    x_RC: Tensor, mean_C: Tensor, variance_C: Tensor, bias_C: Tensor, grad_RC: Tensor, eps: float, use_batch: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and bias."""
    arrays = _arrays(x_RC, mean_C, variance_C, bias_C, eps)
    grad = as_array(grad_RC.contiguous().flatten(0, -2))
    rows, channels = arrays[0].shape
    sums_2PC = torch.empty((2, -(-rows // PIECE_ROWS), channels))
    grad_x_RC = torch.empty(x_RC.shape, dtype=x_RC.dtype)
    h = as_array(grad_x_RC.flatten(0, -2))
    _sums(*arrays, grad, h, as_array(sums_2PC))
    grad_bias_C, product_C = sums_2PC.sum(dim=1)
    level_C = tilt_C = torch.zeros(channels)
    if use_batch:
        scale_C = (variance_C + eps).rsqrt()
        level_C, tilt_C = scale_C * grad_bias_C / rows, scale_C**3 * product_C / rows
    _backward(*arrays[:3], as_array(level_C), as_array(tilt_C), h)
    return grad_x_RC, grad_bias_C


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
