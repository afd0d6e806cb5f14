"""out = max_pool(dropout(leaky_relu(batch_norm(x)))), any part of which may be left out, in one pass over a CPU tensor.

What follows a convolution in a plain convnet. Traffic in units of N * C * H * W elements: forward reads 1 for the batch
statistics and 1 more, and writes a quarter (1 without pooling); backward reads 1 and the quarter twice, and writes 1.
Kept from forward to backward is the input alone: which elements dropout kept and which one of four was the largest is
worked out again, the first from a hash of the element's place and a seed. PyTorch's own CPU operators draw dropout's
numbers on one thread (48 % of a step of `cnn2` on 2 cores) and write every stage in full.

There is no Triton kernel for it yet: on a GPU the public function is plain torch, which torch.compile fuses.
With z = x - mean, scale = weight / std, a = scale * z + bias, and h = the gradient that reaches a:
    grad of bias = sum of h      grad of weight = sum of h * z / std
    grad of x    = scale * (h - (grad of bias + z / std * grad of weight) / (N * H * W)); in eval mode scale * h
"""

# numba changes what its decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar_kernels.batch_statistics import batch_statistics
from fastcifar_kernels.layout import check_companion, check_values
from fastcifar_kernels.loops import as_array, narrow, widen


def bn_relu_pool_reference(
    x_NCHW: Tensor,
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    running_mean_C: Tensor | None = None,
    running_var_C: Tensor | None = None,
    *,
    slope: float = 0.0,
    dropout: float = 0.0,
    pool: bool = False,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The same in plain torch: the truth the loops are held to, but for which elements dropout keeps."""
    if weight_C is not None:
        x_NCHW = F.batch_norm(x_NCHW, running_mean_C, running_var_C, weight_C, bias_C, training, momentum, eps)
    x_NCHW = F.dropout(F.leaky_relu(x_NCHW, slope), dropout, training)
    return F.max_pool2d(x_NCHW, 2) if pool else x_NCHW


def bn_relu_pool(
    x_NCHW: Tensor,
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    running_mean_C: Tensor | None = None,
    running_var_C: Tensor | None = None,
    *,
    slope: float = 0.0,
    dropout: float = 0.0,
    pool: bool = False,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise, rectify, drop and pool a feature map.

    Args:
        x_NCHW: float32, bfloat16 or float16; fastest channels-last.
        weight_C, bias_C: BatchNorm's scale and shift; both None leave the normalisation out.
        running_mean_C, running_var_C: updated in place in training if given, used in eval mode.
        slope: what negative values are multiplied with; 0 is a plain ReLU.
        dropout: share of the rectified values set to 0 in training, in steps of 2**-16, the others growing by
            1 / (1 - dropout). Drawn from torch's generator of the CPU.
        pool: take the largest of every 2 x 2 pixels; a last odd row or column is left out.
        training: normalise with the statistics of this batch and drop; else with the running ones, dropping nothing.
        momentum: share of this batch in the running statistics, as in torch.nn.BatchNorm2d.
        eps: added to the variance.

    Returns:
        [N, C, H, W], or [N, C, H // 2, W // 2] if pooled; channels-last, of the type of `x_NCHW`.

    Raises:
        ValueError: shapes, types or devices do not belong together; a dropout that is no share; training with fewer
            than two values per channel, or eval mode without running statistics.
    """
    check(x_NCHW, weight_C, bias_C, running_mean_C, running_var_C, dropout, training)
    if x_NCHW.device.type != "cpu" or not x_NCHW.numel():
        rest = weight_C, bias_C, running_mean_C, running_var_C
        how = {"slope": slope, "dropout": dropout, "pool": pool}
        return bn_relu_pool_reference(x_NCHW, *rest, **how, training=training, momentum=momentum, eps=eps)
    c, values = x_NCHW.size(1), x_NCHW.numel() // x_NCHW.size(1)
    drop = dropout if training else 0.0
    seed_2 = torch.randint(2**32, (2,)) if drop else torch.zeros(2, dtype=torch.int64)
    if weight_C is None or bias_C is None:
        zero_C, one_C = x_NCHW.new_zeros(c, dtype=torch.float32), x_NCHW.new_ones(c, dtype=torch.float32)
        return _bn_relu_pool(x_NCHW, zero_C, one_C, one_C, zero_C, seed_2, slope, drop, pool, 0.0, False)
    if training:
        mean_C, variance_C = (statistic_1C[0] for statistic_1C in batch_statistics(x_NCHW.unsqueeze(1)))
        with torch.no_grad():
            if running_mean_C is not None:
                running_mean_C.lerp_(mean_C.to(running_mean_C.dtype), momentum)
            if running_var_C is not None:
                running_var_C.lerp_((variance_C * (values / (values - 1))).to(running_var_C.dtype), momentum)
    else:
        assert running_mean_C is not None
        assert running_var_C is not None
        mean_C, variance_C = running_mean_C.float(), running_var_C.float()
    affine = mean_C, variance_C, weight_C.float(), bias_C.float()
    return _bn_relu_pool(x_NCHW, *affine, seed_2, slope, drop, pool, eps, training)


def check(x_NCHW, weight_C, bias_C, running_mean_C, running_var_C, dropout, training) -> None:
    """Raise ValueError unless the arguments belong together."""
    check_values("x_NCHW", x_NCHW, 4)
    if (weight_C is None) != (bias_C is None):
        raise ValueError("weight_C and bias_C go together: give both or neither.")
    given = {"weight_C": weight_C, "bias_C": bias_C, "running_mean_C": running_mean_C, "running_var_C": running_var_C}
    for name, tensor in given.items():
        if tensor is not None:
            check_companion(name, tensor, (x_NCHW.size(1),), "x_NCHW", x_NCHW)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be from 0 to 1, is {dropout}.")
    if weight_C is None:
        return
    values = x_NCHW.numel() // max(1, x_NCHW.size(1))
    if training and values < 2:
        raise ValueError(
            f"training needs at least two values per channel, x_NCHW of shape {tuple(x_NCHW.shape)} has {values}."
        )
    if not training and (running_mean_C is None or running_var_C is None):
        raise ValueError("running_mean_C and running_var_C are needed unless training.")


# numba: x is [N, H, W, C]; `dropped` is the 16-bit number below which an element is dropped, or None without dropout,
# which leaves the drawing out of the compiled loop. Everything about an element stays in registers: with buffers for
# the largest of a window the same loops took five times as long.


@numba.njit(cache=True, forceinline=True, fastmath={"contract"}, error_model="numpy")
def _draw(place, how, dropped):  # pragma: no cover
    """Random bits for an element and its right neighbour, 16 each: a hash (Wellons' lowbias32) of place and seeds."""
    if dropped is None:
        return np.uint32(0)
    bits = np.uint32(place) ^ how[1]
    bits = np.uint32(np.uint32(bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)) ^ how[2]
    bits = np.uint32(np.uint32(bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


@numba.njit(cache=True, forceinline=True, fastmath={"contract"}, error_model="numpy")
def _look(x, mean, scale, bias, bits, how, dropped):  # pragma: no cover
    """(what an element becomes, what its normalised value was multiplied with for that, z)"""
    z = widen(x) - mean
    a = scale * z + bias
    gain = how[0] if a <= np.float32(0) else np.float32(1)
    if dropped is not None:
        gain = np.float32(0) if np.uint32(bits & np.uint32(0xFFFF)) < dropped else gain * how[3]
    return a * gain, gain, z


@numba.njit(cache=True, forceinline=True, fastmath={"contract"}, error_model="numpy")
def _larger(best, other, number):  # pragma: no cover
    """`best` is an element as `_look` gives it, and its number in the window; `other` is the one of this number."""
    take = (other[0] > best[0]) | (other[0] != other[0])  # as in torch, NaN wins
    value, gain, z = (other[0] if take else best[0]), (other[1] if take else best[1]), (other[2] if take else best[2])
    return value, gain, z, (np.int32(number) if take else best[3])


@numba.njit(cache=True, forceinline=True, fastmath={"contract"}, error_model="numpy")
def _largest(x_NHWC, mean_C, scale_C, bias_C, n, i, j, c, how, dropped):  # pragma: no cover
    """The largest element of channel c in window (i, j): value, gain, z, number."""
    height, width, channels = x_NHWC.shape[1:]
    y, x = 2 * i, 2 * j
    mean, scale, bias = mean_C[c], scale_C[c], bias_C[c]
    place = ((n * height + y) * width + x) * channels + c
    bits = _draw(place, how, dropped)
    first = _look(x_NHWC[n, y, x, c], mean, scale, bias, bits, how, dropped)
    best = first[0], first[1], first[2], np.int32(0)
    other = _look(x_NHWC[n, y, x + 1, c], mean, scale, bias, bits >> np.uint32(16), how, dropped)
    best = _larger(best, other, 1)
    bits = _draw(place + width * channels, how, dropped)
    other = _look(x_NHWC[n, y + 1, x, c], mean, scale, bias, bits, how, dropped)
    best = _larger(best, other, 2)
    other = _look(x_NHWC[n, y + 1, x + 1, c], mean, scale, bias, bits >> np.uint32(16), how, dropped)
    return _larger(best, other, 3)


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _pooled_forward(x_NHWC, mean_C, scale_C, bias_C, how, dropped, out_NHWC):  # pragma: no cover
    height, width, channels = out_NHWC.shape[1:]
    for n in numba.prange(len(x_NHWC)):
        for i in range(height):
            for j in range(width):
                for c in range(channels):
                    value, _, _, _ = _largest(x_NHWC, mean_C, scale_C, bias_C, n, i, j, c, how, dropped)
                    out_NHWC[n, i, j, c] = narrow(value, out_NHWC[n, i, j, c])


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _pooled_sums(x_NHWC, mean_C, scale_C, bias_C, how, dropped, grad_NHWC, sums_2NC):  # pragma: no cover
    """Each sample's share of the gradients of bias and (times std) weight."""
    height, width, channels = grad_NHWC.shape[1:]
    for n in numba.prange(len(x_NHWC)):
        bias_sum_C, scale_sum_C = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
        for i in range(height):
            for j in range(width):
                for c in range(channels):
                    _, gain, z, _ = _largest(x_NHWC, mean_C, scale_C, bias_C, n, i, j, c, how, dropped)
                    h = gain * widen(grad_NHWC[n, i, j, c])
                    bias_sum_C[c] += h
                    scale_sum_C[c] += h * z
        sums_2NC[0, n] = bias_sum_C
        sums_2NC[1, n] = scale_sum_C


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _pooled_backward(
    x_NHWC, mean_C, scale_C, bias_C, how, dropped, grad_NHWC, level_C, tilt_C, grad_x_NHWC
):  # pragma: no cover
    """The gradient of x; what the batch's mean and deviation pass back is level + tilt * z."""
    height, width, channels = x_NHWC.shape[1:]
    for n in numba.prange(len(x_NHWC)):
        for i in range(height // 2):
            for j in range(width // 2):
                y, x = 2 * i, 2 * j
                for c in range(channels):
                    _, gain, _, number = _largest(x_NHWC, mean_C, scale_C, bias_C, n, i, j, c, how, dropped)
                    passed = scale_C[c] * gain * widen(grad_NHWC[n, i, j, c])
                    zero, mean, level, tilt = np.float32(0), mean_C[c], level_C[c], tilt_C[c]
                    grad = (passed if number == 0 else zero) - (level + tilt * (widen(x_NHWC[n, y, x, c]) - mean))
                    grad_x_NHWC[n, y, x, c] = narrow(grad, grad_x_NHWC[n, y, x, c])
                    grad = (passed if number == 1 else zero) - (level + tilt * (widen(x_NHWC[n, y, x + 1, c]) - mean))
                    grad_x_NHWC[n, y, x + 1, c] = narrow(grad, grad_x_NHWC[n, y, x + 1, c])
                    grad = (passed if number == 2 else zero) - (level + tilt * (widen(x_NHWC[n, y + 1, x, c]) - mean))
                    grad_x_NHWC[n, y + 1, x, c] = narrow(grad, grad_x_NHWC[n, y + 1, x, c])
                    z = widen(x_NHWC[n, y + 1, x + 1, c]) - mean
                    grad = (passed if number == 3 else zero) - (level + tilt * z)
                    grad_x_NHWC[n, y + 1, x + 1, c] = narrow(grad, grad_x_NHWC[n, y + 1, x + 1, c])
        for y in range(height):
            # The last odd column, and all of the last odd row.
            for x in range(width // 2 * 2 if y < height // 2 * 2 else 0, width):
                for c in range(channels):
                    grad = -(level_C[c] + tilt_C[c] * (widen(x_NHWC[n, y, x, c]) - mean_C[c]))
                    grad_x_NHWC[n, y, x, c] = narrow(grad, grad_x_NHWC[n, y, x, c])


@numba.njit(cache=True, forceinline=True, fastmath={"contract"}, error_model="numpy")
def _alone(x_NHWC, mean_C, scale_C, bias_C, n, y, x, c, how, dropped):  # pragma: no cover
    """An element without its window: value, gain, z."""
    height, width, channels = x_NHWC.shape[1:]
    bits = _draw(((n * height + y) * width + x // 2 * 2) * channels + c, how, dropped)
    bits = np.uint32(bits >> np.uint32(x % 2 * 16))
    return _look(x_NHWC[n, y, x, c], mean_C[c], scale_C[c], bias_C[c], bits, how, dropped)


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _plain_forward(x_NHWC, mean_C, scale_C, bias_C, how, dropped, out_NHWC):  # pragma: no cover
    height, width, channels = x_NHWC.shape[1:]
    for n in numba.prange(len(x_NHWC)):
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    value, _, _ = _alone(x_NHWC, mean_C, scale_C, bias_C, n, y, x, c, how, dropped)
                    out_NHWC[n, y, x, c] = narrow(value, out_NHWC[n, y, x, c])


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _plain_sums(x_NHWC, mean_C, scale_C, bias_C, how, dropped, grad_NHWC, sums_2NC):  # pragma: no cover
    height, width, channels = x_NHWC.shape[1:]
    for n in numba.prange(len(x_NHWC)):
        bias_sum_C, scale_sum_C = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    _, gain, z = _alone(x_NHWC, mean_C, scale_C, bias_C, n, y, x, c, how, dropped)
                    h = gain * widen(grad_NHWC[n, y, x, c])
                    bias_sum_C[c] += h
                    scale_sum_C[c] += h * z
        sums_2NC[0, n] = bias_sum_C
        sums_2NC[1, n] = scale_sum_C


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _plain_backward(
    x_NHWC, mean_C, scale_C, bias_C, how, dropped, grad_NHWC, level_C, tilt_C, grad_x_NHWC
):  # pragma: no cover
    height, width, channels = x_NHWC.shape[1:]
    for n in numba.prange(len(x_NHWC)):
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    _, gain, z = _alone(x_NHWC, mean_C, scale_C, bias_C, n, y, x, c, how, dropped)
                    grad = scale_C[c] * gain * widen(grad_NHWC[n, y, x, c]) - (level_C[c] + tilt_C[c] * z)
                    grad_x_NHWC[n, y, x, c] = narrow(grad, grad_x_NHWC[n, y, x, c])


def _rows(x_NCHW: Tensor) -> Tensor:
    """[N, H, W, C], contiguous: a view of a channels-last tensor, a copy of any other layout."""
    return x_NCHW.permute(0, 2, 3, 1).contiguous()


def _empty(x_NCHW: Tensor, side: int) -> Tensor:
    """An unwritten channels-last [N, C, H // side, W // side] of the type and device of `x_NCHW`."""
    n, c, height, width = x_NCHW.shape
    out_NHWC = torch.empty((n, height // side, width // side, c), dtype=x_NCHW.dtype, device=x_NCHW.device)
    return out_NHWC.permute(0, 3, 1, 2)


def _how(seed_2: Tensor, slope: float, dropout: float) -> tuple:
    """(slope, two seeds, what is kept grows by) and below which of 2**16 numbers is dropped, in the loops' types."""
    seed, second_seed = (np.uint32(seed) for seed in seed_2.tolist())
    how = np.float32(slope), seed, second_seed, np.float32(1 / (1 - dropout) if dropout < 1 else 0)
    return how, np.uint32(round(dropout * 2**16)) if dropout else None


# The operators


@torch.library.custom_op("fastcifar_kernels::bn_relu_pool", mutates_args=())
def _bn_relu_pool(
    x_NCHW: Tensor,
    mean_C: Tensor,
    variance_C: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    seed_2: Tensor,
    slope: float,
    dropout: float,
    pool: bool,
    eps: float,
    use_batch: bool,
) -> Tensor:
    if x_NCHW.dtype == torch.float16:  # numba does not compute in it
        rest = mean_C, variance_C, weight_C, bias_C, seed_2, slope, dropout, pool, eps, use_batch
        return _bn_relu_pool(x_NCHW.float(), *rest).to(x_NCHW.dtype)
    out_NCHW = _empty(x_NCHW, side=2 if pool else 1)
    scale_C = weight_C / (variance_C + eps).sqrt()
    tensors = [as_array(tensor.contiguous()) for tensor in (_rows(x_NCHW), mean_C, scale_C, bias_C)]
    forward = _pooled_forward if pool else _plain_forward
    forward(*tensors, *_how(seed_2, slope, dropout), as_array(_rows(out_NCHW)))
    return out_NCHW


@torch.library.custom_op("fastcifar_kernels::bn_relu_pool_backward", mutates_args=())
def _bn_relu_pool_backward(
    x_NCHW: Tensor,
    mean_C: Tensor,
    variance_C: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    seed_2: Tensor,
    grad_NCHW: Tensor,
    slope: float,
    dropout: float,
    pool: bool,
    eps: float,
    use_batch: bool,
    affine: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of bias and weight as one [2, C], or nothing of use there unless `affine` asks for it."""
    if x_NCHW.dtype == torch.float16:  # numba does not compute in it
        rest = mean_C, variance_C, weight_C, bias_C, seed_2, grad_NCHW.float(), slope, dropout, pool, eps, use_batch
        grad_x_NCHW, grad_affine_2C = _bn_relu_pool_backward(x_NCHW.float(), *rest, affine)
        return grad_x_NCHW.to(x_NCHW.dtype), grad_affine_2C
    n, c, height, width = x_NCHW.shape
    rstd_C = 1 / (variance_C + eps).sqrt()
    scale_C = weight_C * rstd_C
    tensors = [as_array(tensor.contiguous()) for tensor in (_rows(x_NCHW), mean_C, scale_C, bias_C)]
    shared = *tensors, *_how(seed_2, slope, dropout), as_array(_rows(grad_NCHW))
    grad_affine_2C = torch.zeros((2, c))
    if use_batch or affine:
        sums_2NC = torch.empty((2, n, c))
        (_pooled_sums if pool else _plain_sums)(*shared, as_array(sums_2NC))
        grad_affine_2C = sums_2NC.sum(dim=1)
        grad_affine_2C[1] *= rstd_C
    level_C = tilt_C = torch.zeros(c)
    if use_batch:
        level_C = scale_C * grad_affine_2C[0] / (n * height * width)
        tilt_C = scale_C * rstd_C * grad_affine_2C[1] / (n * height * width)
    grad_x_NCHW = _empty(x_NCHW, side=1)
    backward = _pooled_backward if pool else _plain_backward
    backward(*shared, as_array(level_C), as_array(tilt_C), as_array(_rows(grad_x_NCHW)))
    return grad_x_NCHW, grad_affine_2C


@_bn_relu_pool.register_fake
def _(x_NCHW, mean_C, variance_C, weight_C, bias_C, seed_2, slope, dropout, pool, eps, use_batch):
    return _empty(x_NCHW, side=2 if pool else 1)


@_bn_relu_pool_backward.register_fake
def _(x_NCHW, mean_C, variance_C, weight_C, bias_C, seed_2, grad_NCHW, slope, dropout, pool, eps, use_batch, affine):
    grad_x_NCHW = _empty(x_NCHW, side=1)
    return grad_x_NCHW, torch.empty((2, x_NCHW.size(1)), device=x_NCHW.device)


def _save(ctx, inputs, output) -> None:
    *tensors, slope, dropout, pool, eps, use_batch = inputs
    ctx.save_for_backward(*tensors)
    ctx.rest = slope, dropout, pool, eps, use_batch


def _gradients(ctx, grad_NCHW: Tensor):
    affine = any(ctx.needs_input_grad[3:5])
    grad_x_NCHW, (grad_bias_C, grad_weight_C) = _bn_relu_pool_backward(*ctx.saved_tensors, grad_NCHW, *ctx.rest, affine)
    return grad_x_NCHW, None, None, grad_weight_C, grad_bias_C, *[None] * 6


_bn_relu_pool.register_autograd(_gradients, setup_context=_save)
