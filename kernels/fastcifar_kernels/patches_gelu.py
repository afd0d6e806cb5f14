"""gelu(2x2 convolution + bias) of colour images into blocked ones, on a CPU: a frozen first layer.

The four pixels that a filter sees are 12 numbers, less than a row of an AMX tile holds. So the work is to copy them
there, and GELU, not the product. The gradient goes to the bias alone: filters that are set before a training need none,
and images never do.

Shapes: N images, G groups of M = 32, H rows, W columns of an image, O = 32 channels.
"""

# numba changes what its decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar_kernels import amx, vectors
from fastcifar_kernels.bn_gelu import PHI, SLOPE, _curve
from fastcifar_kernels.conv_blocked import blocks_run
from fastcifar_kernels.layout import GROUP, check_companion, check_values
from fastcifar_kernels.loops import as_array, narrow, parts_of, use_wide_vectors, widen

CHANNELS = 32  # of the result; those without a filter are 0


def patches_gelu_reference(x_NCHW: Tensor, w_OCHW: Tensor, bias_O: Tensor) -> Tensor:
    """The same in plain torch: the truth that the loops are held to."""
    a_NOHW = F.gelu(F.conv2d(x_NCHW, w_OCHW.to(x_NCHW.dtype), bias_O.to(x_NCHW.dtype)))
    groups = -(-len(x_NCHW) // GROUP)
    a_NOHW = F.pad(a_NOHW, (0, 0, 0, 0, 0, CHANNELS - len(w_OCHW), 0, groups * GROUP - len(x_NCHW)))
    return a_NOHW.unflatten(0, (groups, GROUP)).permute(0, 3, 4, 1, 2).contiguous()


def patches_gelu(x_NCHW: Tensor, w_OCHW: Tensor, bias_O: Tensor) -> Tensor:
    """What each filter makes of 2 x 2 pixels, no padding.

    Args:
        x_NCHW: [N, 3, H, W], fastest channels-last. The loops take what `blocks_run` says; anything else is plain
            torch.
        w_OCHW: [O, 3, 2, 2], at most 32 filters.
        bias_O: the only argument that gets a gradient from the loops.

    Returns:
        [G, H - 1, W - 1, 32, 32], of the type of `x_NCHW`; channels beyond O are 0, what fills the last group up is any
        image. GELU is the polynomial of `bn_gelu`, in float32, too.

    Raises:
        ValueError: shapes, types or devices do not belong together; the loops are asked for another gradient.
    """
    check_values("x_NCHW", x_NCHW, 4)
    filters = len(w_OCHW)
    if x_NCHW.size(1) != 3 or min(x_NCHW.shape[2:]) < 2 or not len(x_NCHW):
        raise ValueError(f"x_NCHW must be colour images of at least 2 x 2 pixels, has shape {tuple(x_NCHW.shape)}.")
    check_companion("w_OCHW", w_OCHW, (filters, 3, 2, 2), "x_NCHW", x_NCHW)
    check_companion("bias_O", bias_O, (filters,), "w_OCHW", w_OCHW)
    if not 1 <= filters <= CHANNELS:
        raise ValueError(f"w_OCHW must have 1 to {CHANNELS} filters, has shape {tuple(w_OCHW.shape)}.")
    if not blocks_run(x_NCHW):
        return patches_gelu_reference(x_NCHW, w_OCHW, bias_O)
    if torch.is_grad_enabled() and (x_NCHW.requires_grad or w_OCHW.requires_grad):
        raise ValueError("x_NCHW and w_OCHW get no gradient here, and one of them requires it: detach it.")
    return _patches_gelu(x_NCHW, w_OCHW, bias_O)


# numba: without AMX `tiles` is None. To numba that is a type, and what needs tiles is not even compiled then.


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _patch_block(x_NHWC, g, i, j, w, rows_MD, block_MO, vector, tiles):  # pragma: no cover
    """The block becomes the patches of 32 images at (i, j) times the filters."""
    images, height, width, channels = x_NHWC.shape
    rows, block = rows_MD.ctypes.data, block_MO.ctypes.data
    if tiles is not None:
        row = width * channels * 2
        patches = x_NHWC.ctypes.data + i * row + j * channels * 2
        amx.copy_patches(patches, height * row, row, g * GROUP, images - 1, rows)
        amx.clear_block()
        amx.multiply_rows(rows, rows + 1024, 64, w, w + 1024, 1)
        amx.store_block(block)
    else:
        for m in range(GROUP):
            image = min(g * GROUP + m, images - 1)
            for d in range(12):
                rows_MD[m, d] = x_NHWC[image, i + d // 6, j + d % 6 // 3, d % 3]
        lanes, row = len(vector), rows_MD.strides[0]
        steps = 12 * rows_MD.itemsize // 4
        for column in range(0, CHANNELS // lanes, 2):
            for m in range(0, GROUP, lanes // 2):
                columns = w + column * steps * lanes * 4
                to = block + m * CHANNELS * 4 + column * lanes * 4
                vectors.multiply(
                    vector, rows + m * row, row, 4, columns, steps * lanes * 4, lanes * 4, steps, to, CHANNELS * 4
                )


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _forward(x_NHWC, w, bias_O, out_GHWMO, rows_PMD, blocks_PMO, vector, tiles):  # pragma: no cover
    groups, height, width, _, _ = out_GHWMO.shape
    parts = len(blocks_PMO)
    for part in numba.prange(parts):
        use_wide_vectors()
        block_MO = blocks_PMO[part]
        if tiles is not None:
            amx.configure(tiles.ctypes.data)
        for g in range(part * groups // parts, (part + 1) * groups // parts):
            for i in range(height):
                for j in range(width):
                    _patch_block(x_NHWC, g, i, j, w, rows_PMD[part], block_MO, vector, tiles)
                    for m in range(GROUP):
                        for o in range(CHANNELS):
                            u = block_MO[m, o] + bias_O[o]
                            out_GHWMO[g, i, j, m, o] = narrow(u * _curve(u, PHI), out_GHWMO[0, 0, 0, 0, 0])
        if tiles is not None:
            amx.release()


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _to_bias(x_NHWC, w, bias_O, grad_GHWMO, sums_GO, rows_PMD, blocks_PMO, vector, tiles):  # pragma: no cover
    """Each group's share of the gradient of the bias."""
    groups, height, width, _, _ = grad_GHWMO.shape
    parts = len(blocks_PMO)
    for part in numba.prange(parts):
        use_wide_vectors()
        block_MO, sum_O = blocks_PMO[part], np.empty(CHANNELS, np.float32)
        if tiles is not None:
            amx.configure(tiles.ctypes.data)
        for g in range(part * groups // parts, (part + 1) * groups // parts):
            sum_O[:] = 0
            for i in range(height):
                for j in range(width):
                    _patch_block(x_NHWC, g, i, j, w, rows_PMD[part], block_MO, vector, tiles)
                    for m in range(GROUP):
                        for o in range(CHANNELS):
                            sum_O[o] += _curve(block_MO[m, o] + bias_O[o], SLOPE) * widen(grad_GHWMO[g, i, j, m, o])
            sums_GO[g] = sum_O
        if tiles is not None:
            amx.release()


# The operators


def _arguments(x_NCHW: Tensor, w_OCHW: Tensor, bias_O: Tensor):
    """Images [N, H, W, 3], the filters as a matrix to be multiplied by, biases [32]."""
    dtype = x_NCHW.dtype
    w_OD = w_OCHW.permute(0, 2, 3, 1).flatten(1)
    if amx.runs(x_NCHW):
        w_OD = F.pad(w_OD, (0, 32 - w_OD.size(1)))
    lanes, pairs = 16 if amx.runs(x_NCHW) else vectors.LANES[dtype], 4 // dtype.itemsize
    padded_OD = F.pad(w_OD, (0, 0, 0, CHANNELS - len(w_OD)))
    w = padded_OD.view(CHANNELS // lanes, lanes, -1, pairs).permute(0, 2, 1, 3).to(dtype).contiguous()
    bias = F.pad(bias_O.detach().float(), (0, CHANNELS - len(bias_O)))
    return as_array(x_NCHW.permute(0, 2, 3, 1).contiguous()), w, as_array(bias)


def _buffers(x_NCHW: Tensor, groups: int) -> list:
    """For every part rows of patches, 64 bytes that begin as 0, and a block; then what vectors are, and tiles."""
    parts, dtype = parts_of(groups), x_NCHW.dtype
    rows = torch.zeros((parts, GROUP, 64 // dtype.itemsize), dtype=dtype)
    tiles = amx.WHOLE_TILES if amx.runs(x_NCHW) else None
    return [as_array(rows), as_array(torch.empty((parts, GROUP, CHANNELS))), vectors.vector_of(dtype), tiles]


@torch.library.custom_op("fastcifar_kernels::patches_gelu", mutates_args=())
def _patches_gelu(x_NCHW: Tensor, w_OCHW: Tensor, bias_O: Tensor) -> Tensor:
    n, _, height, width = x_NCHW.shape
    out = torch.empty((-(-n // GROUP), height - 1, width - 1, GROUP, CHANNELS), dtype=x_NCHW.dtype)
    x_NHWC, w, bias = _arguments(x_NCHW, w_OCHW, bias_O)
    _forward(x_NHWC, w.data_ptr(), bias, as_array(out), *_buffers(x_NCHW, len(out)))
    return out


@torch.library.custom_op("fastcifar_kernels::patches_gelu_backward", mutates_args=())
def _patches_gelu_backward(x_NCHW: Tensor, w_OCHW: Tensor, bias_O: Tensor, grad_GHWMO: Tensor) -> Tensor:
    """The gradient of the bias."""
    x_NHWC, w, bias = _arguments(x_NCHW, w_OCHW, bias_O)
    sums_GO = torch.empty((len(grad_GHWMO), CHANNELS))
    arrays = as_array(grad_GHWMO.contiguous()), as_array(sums_GO)
    _to_bias(x_NHWC, w.data_ptr(), bias, *arrays, *_buffers(x_NCHW, len(sums_GO)))
    return sums_GO.sum(dim=0)[: len(bias_O)].to(bias_O.dtype)


@_patches_gelu.register_fake
def _(x_NCHW, w_OCHW, bias_O):
    n, _, height, width = x_NCHW.shape
    return x_NCHW.new_empty((-(-n // GROUP), height - 1, width - 1, GROUP, CHANNELS))


@_patches_gelu_backward.register_fake
def _(x_NCHW, w_OCHW, bias_O, grad_GHWMO):
    return torch.empty_like(bias_O)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_GHWMO: Tensor):
    to_bias = ctx.needs_input_grad[2]
    return None, None, _patches_gelu_backward(*ctx.saved_tensors, grad_GHWMO) if to_bias else None


_patches_gelu.register_autograd(_gradients, setup_context=_save)
