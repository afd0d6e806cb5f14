"""A 3x3 convolution as matrix products: for many filters on small maps, on a CPU.

Every pixel becomes a row of its 3 x 3 neighbours' channels, and the filters a matrix that all rows are multiplied with.
oneDNN's convolution, in bfloat16 on a CPU with AMX, reads all filters anew for every image. Where they outgrow a core's
L2 cache and an image has few pixels to use them on, it waits for memory: 500 images of 256 channels, 5 x 5 pixels, to
1,024 channels took it 58 ms forward and 229 backward, matrix products 34 and 86 (59 and 118 GFLOP, 2 cores with AMX;
bench/records/2026-11-21-small-maps-cpu).

Matrix products, in blocks of images whose rows take at most ROWS_BYTES: out = rows @ w, grad of w = grad.T @ rows,
grad of rows = grad @ w.T; a loop then sums for every pixel what nine rows hold for it.

Shapes: N images, C channels in, O filters, H rows, W columns, D = 9 * C.
"""

# numba changes what its decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Iterator

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar_kernels.layout import check_companion, check_values
from fastcifar_kernels.loops import as_array, narrow, widen

ROWS_BYTES = 64 * 2**20  # larger blocks were no faster, and of 4 MiB a quarter slower


def conv_matmul_reference(x_NCHW: Tensor, w_OCHW: Tensor) -> Tensor:
    """The same in plain torch: the truth that the matrix products are held to."""
    return F.conv2d(x_NCHW, w_OCHW.to(x_NCHW.dtype), padding=1)


def conv_matmul(x_NCHW: Tensor, w_OCHW: Tensor) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1 without bias.

    Args:
        x_NCHW: float32, bfloat16 or float16; fastest channels-last.
        w_OCHW: [O, C, 3, 3] of any of these types; computed with in the type of `x_NCHW`, its gradient in its own.

    Returns:
        [N, O, H, W], channels-last, of the type of `x_NCHW`.

    Raises:
        ValueError: shapes, types or devices do not belong together.
    """
    check_values("x_NCHW", x_NCHW, 4)
    check_companion("w_OCHW", w_OCHW, (*w_OCHW.shape[:1], x_NCHW.size(1), 3, 3), "x_NCHW", x_NCHW)
    if x_NCHW.device.type != "cpu" or x_NCHW.dtype == torch.float16 or not x_NCHW.numel() or not w_OCHW.numel():
        return conv_matmul_reference(x_NCHW, w_OCHW)
    return _conv_matmul(x_NCHW, w_OCHW)


def _pixels(x_NCHW: Tensor) -> Tensor:
    """[N, H, W, C], contiguous: a view of a channels-last tensor, a copy of any other layout."""
    return x_NCHW.permute(0, 2, 3, 1).contiguous()


def _matrix(w_OCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """The filters as [O, D], rows before columns before channels."""
    return w_OCHW.permute(0, 2, 3, 1).reshape(len(w_OCHW), -1).to(dtype)


def _rows(x_NHWC: Tensor) -> Tensor:
    """[N * H * W, D]: the 3 x 3 neighbours of every pixel, those outside the image 0."""
    n, h, w, c = x_NHWC.shape
    padded = F.pad(x_NHWC, (0, 0, 1, 1, 1, 1))
    image, row, column, _ = padded.stride()
    return padded.as_strided((n, h, w, 3, 3, c), (image, row, column, row, column, 1)).reshape(n * h * w, 9 * c)


def _blocks(x_NHWC: Tensor) -> Iterator[slice]:
    """Which images to take at a time."""
    image_bytes = 9 * x_NHWC[0].numel() * x_NHWC.element_size()
    size = max(1, ROWS_BYTES // image_bytes)
    return (slice(first, first + size) for first in range(0, len(x_NHWC), size))


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _sum_neighbours(rows_NHWIJC, out_NHWC):  # pragma: no cover
    """For every pixel the sum of what the rows of its neighbours, and its own, hold for it."""
    height, width, channels = out_NHWC.shape[1:]
    for n in numba.prange(len(out_NHWC)):
        sum_C = np.empty(channels, np.float32)
        for y in range(height):
            for x in range(width):
                sum_C[:] = 0
                for i in range(max(0, y + 2 - height), min(3, y + 2)):
                    for j in range(max(0, x + 2 - width), min(3, x + 2)):
                        for c in range(channels):
                            sum_C[c] += widen(rows_NHWIJC[n, y + 1 - i, x + 1 - j, i, j, c])
                for c in range(channels):
                    out_NHWC[n, y, x, c] = narrow(sum_C[c], out_NHWC[n, y, x, c])


# The operators


@torch.library.custom_op("fastcifar_kernels::conv_matmul", mutates_args=())
def _conv_matmul(x_NCHW: Tensor, w_OCHW: Tensor) -> Tensor:
    x_NHWC, w_OD = _pixels(x_NCHW), _matrix(w_OCHW, x_NCHW.dtype)
    out_NHWO = torch.empty((*x_NHWC.shape[:3], len(w_OD)), dtype=x_NCHW.dtype)
    for block in _blocks(x_NHWC):
        torch.mm(_rows(x_NHWC[block]), w_OD.T, out=out_NHWO[block].view(-1, len(w_OD)))
    return out_NHWO.permute(0, 3, 1, 2)


@torch.library.custom_op("fastcifar_kernels::conv_matmul_backward", mutates_args=())
def _conv_matmul_backward(x_NCHW: Tensor, w_OCHW: Tensor, grad_NOHW: Tensor, to_input: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x, which is empty unless asked for, and w."""
    x_NHWC, grad_NHWO, w_OD = _pixels(x_NCHW), _pixels(grad_NOHW), _matrix(w_OCHW, x_NCHW.dtype)
    asked_NHWC = x_NHWC if to_input else x_NHWC[:0]
    grad_x_NHWC, grad_w_OD = torch.empty(asked_NHWC.shape, dtype=x_NCHW.dtype), torch.zeros(w_OD.shape)
    for block in _blocks(x_NHWC):
        grad_PO = grad_NHWO[block].flatten(0, 2)
        grad_w_OD += grad_PO.T @ _rows(x_NHWC[block])
        if to_input:
            rows_NHWIJC = (grad_PO @ w_OD).view(*x_NHWC[block].shape[:3], 3, 3, -1)
            _sum_neighbours(as_array(rows_NHWIJC), as_array(grad_x_NHWC[block]))
    grad_w_OHWC = grad_w_OD.to(w_OCHW.dtype).view(len(w_OD), 3, 3, -1)
    return grad_x_NHWC.permute(0, 3, 1, 2), grad_w_OHWC.permute(0, 3, 1, 2)


@_conv_matmul.register_fake
def _(x_NCHW, w_OCHW):
    n, _, h, w = x_NCHW.shape
    return x_NCHW.new_empty((n, h, w, len(w_OCHW))).permute(0, 3, 1, 2)


@_conv_matmul_backward.register_fake
def _(x_NCHW, w_OCHW, grad_NOHW, to_input):
    n, c, h, w = x_NCHW.shape
    grad_w_OHWC = w_OCHW.new_empty((len(w_OCHW), 3, 3, c))
    return x_NCHW.new_empty((n if to_input else 0, h, w, c)).permute(0, 3, 1, 2), grad_w_OHWC.permute(0, 3, 1, 2)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_NOHW: Tensor):
    to_input, to_weight = ctx.needs_input_grad
    grad_x_NCHW, grad_w_OCHW = _conv_matmul_backward(*ctx.saved_tensors, grad_NOHW, to_input)
    return (grad_x_NCHW if to_input else None), (grad_w_OCHW if to_weight else None)


_conv_matmul.register_autograd(_gradients, setup_context=_save)
