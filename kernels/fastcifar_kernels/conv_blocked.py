"""3x3 convolutions of blocked images on a CPU, with 2x2 max pooling before anything is written.

Images lie in groups of 32, and those of a group side by side at every pixel: x_GHWMC. So a pixel is a matrix of images
and channels, whatever the size of the image. Such matrices are multiplied by the filters on a matrix unit
(`conv_amx.py`), or first transformed so that there is less to multiply (`conv_winograd.py`).

Shapes: G groups, H rows, W columns, M = 32 images of a group, C channels in, O filters; both multiples of 32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar_kernels import amx, conv_amx, conv_winograd, vectors
from fastcifar_kernels.layout import BLOCK_CHANNELS, GROUP, check_companion, check_values

# With so many filters of so many channels, and pixels, transforming images pays on a matrix unit: 256 filters of 64
# channels at 15 x 15 pixels, pooled, 28 to 22 ms, of 256 channels at 7 x 7 24 to 21, and where others slow the unit 69
# to 35 and 54 to 35. Gradients that must be scattered to pixels first lose (24 to 28), so do the filters' (25 to 41).
TRANSFORMED_FILTERS, TRANSFORMED_PIXELS = 64 * 256, 36


def conv_blocked_reference(x_GHWMC: Tensor, w_OCHW: Tensor, pool: bool = False) -> Tensor:
    """The same in plain torch: the truth that the loops are held to."""
    groups, height, width, _, channels = x_GHWMC.shape
    x_NCHW = x_GHWMC.permute(0, 3, 4, 1, 2).reshape(-1, channels, height, width)
    y_NOHW = F.conv2d(x_NCHW, w_OCHW.to(x_NCHW.dtype), padding=1)
    y_NOHW = F.max_pool2d(y_NOHW, 2) if pool else y_NOHW
    return y_NOHW.unflatten(0, (groups, GROUP)).permute(0, 3, 4, 1, 2).contiguous()


def conv_blocked(x_GHWMC: Tensor, w_OCHW: Tensor, pool: bool = False) -> Tensor:
    """A 3x3 convolution of stride 1 and padding 1 without bias, then the largest of each 2 x 2 pixels if `pool`.

    Args:
        x_GHWMC: at least a pixel and 32 channels. The loops take what `blocks_run` says; anything else is plain torch.
        w_OCHW: [O, C, 3, 3], O a multiple of 32; computed with in the type of `x_GHWMC`, its gradient in its own.

    Returns:
        [G, H, W, 32, O], or [G, H // 2, W // 2, 32, O], contiguous, of the type of `x_GHWMC`. The loops may
        leave NaN out of the largest of four, where torch takes it. Except on AMX with few channels or pixels, what is
        multiplied has been transformed and rounded once more: in bfloat16 errors are 1.2 % of the result's size (root
        mean square; torch: 0.2 %), and NaN or infinity in a pixel spreads to tiles of 4 x 4.

    Raises:
        ValueError: shapes, types or devices do not belong together.
    """
    check_values("x_GHWMC", x_GHWMC, 5)
    if x_GHWMC.size(3) != GROUP or x_GHWMC.size(4) % BLOCK_CHANNELS or 0 in x_GHWMC.shape[1:]:
        raise ValueError(
            f"x_GHWMC must have pixels, {GROUP} images a group and a multiple of {BLOCK_CHANNELS} channels, "
            f"has shape {tuple(x_GHWMC.shape)}."
        )
    check_companion("w_OCHW", w_OCHW, (*w_OCHW.shape[:1], x_GHWMC.size(4), 3, 3), "x_GHWMC", x_GHWMC)
    if len(w_OCHW) % BLOCK_CHANNELS or not len(w_OCHW):
        raise ValueError(f"w_OCHW must have a multiple of {BLOCK_CHANNELS} filters, has shape {tuple(w_OCHW.shape)}.")
    if pool and min(x_GHWMC.shape[1:3]) < 2:
        raise ValueError(f"pooling needs at least 2 x 2 pixels, x_GHWMC has shape {tuple(x_GHWMC.shape)}.")
    if not blocks_run(x_GHWMC) or not len(x_GHWMC):
        return conv_blocked_reference(x_GHWMC, w_OCHW, pool)
    w_OCHW = w_OCHW.float() if w_OCHW.dtype == torch.float16 else w_OCHW  # which numba does not know
    return _conv_blocked(x_GHWMC.contiguous(), w_OCHW, pool)[0]


def blocks_run(x: Tensor) -> bool:
    """Whether the loops take this tensor: on x86 float32, with AVX2, and bfloat16, if the processor multiplies it."""
    return amx.runs(x) or vectors.runs(x)


def transforms(x_GHWMC: Tensor, w_OCHW: Tensor) -> bool:
    """Whether these images are transformed before they are multiplied, and so the gradient, but of what is pooled."""
    (filters, channels), (height, width) = w_OCHW.shape[:2], x_GHWMC.shape[1:3]
    pays = filters * channels >= TRANSFORMED_FILTERS and height * width >= TRANSFORMED_PIXELS
    return vectors.runs(x_GHWMC) and (pays or not amx.runs(x_GHWMC))


# The operators


@torch.library.custom_op("fastcifar_kernels::conv_blocked", mutates_args=())
def _conv_blocked(x_GHWMC: Tensor, w_OCHW: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """The output, and which of four pixels was the largest: [G, H // 2, W // 2, M, O / 32, 2] of 32 bits each."""
    loops = conv_winograd if transforms(x_GHWMC, w_OCHW) else conv_amx
    return loops.forward(x_GHWMC, w_OCHW, pool)


@torch.library.custom_op("fastcifar_kernels::conv_blocked_backward", mutates_args=())
def _conv_blocked_backward(
    x_GHWMC: Tensor, w_OCHW: Tensor, which: Tensor, grad_GHWMO: Tensor, pool: bool, to_input: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x, which is empty unless asked for, and w."""
    grad_GHWMO, grad_x_GHWMC = grad_GHWMO.contiguous(), torch.empty_like(x_GHWMC[:0])
    direct = conv_amx if amx.runs(x_GHWMC) else conv_winograd
    if to_input:
        loops = conv_winograd if transforms(x_GHWMC, w_OCHW) and not pool else direct
        grad_x_GHWMC = loops.to_input(w_OCHW, which, grad_GHWMO, pool, *x_GHWMC.shape[1:3])
    return grad_x_GHWMC, direct.to_filters(x_GHWMC, w_OCHW, which, grad_GHWMO, pool)


@_conv_blocked.register_fake
def _(x_GHWMC, w_OCHW, pool):
    groups, height, width, _, _ = x_GHWMC.shape
    filters = len(w_OCHW)
    size = (height // 2, width // 2) if pool else (height, width)
    which = x_GHWMC.new_empty((groups, *size, GROUP, filters // 32, 2) if pool else (0,), dtype=torch.int32)
    return x_GHWMC.new_empty((groups, *size, GROUP, filters)), which


@_conv_blocked_backward.register_fake
def _(x_GHWMC, w_OCHW, which, grad_GHWMO, pool, to_input):
    o, c = w_OCHW.shape[:2]
    grad_w_OHWC = w_OCHW.new_empty((o, 3, 3, c))
    return torch.empty_like(x_GHWMC if to_input else x_GHWMC[:0]), grad_w_OHWC.permute(0, 3, 1, 2)


def _save(ctx, inputs, output) -> None:
    x_GHWMC, w_OCHW, ctx.pool = inputs
    ctx.save_for_backward(x_GHWMC, w_OCHW, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_GHWMO: Tensor, _):
    to_input, to_filters, _ = ctx.needs_input_grad
    grad_x_GHWMC, grad_w_OCHW = _conv_blocked_backward(*ctx.saved_tensors, grad_GHWMO, ctx.pool, to_input)
    return (grad_x_GHWMC if to_input else None), (grad_w_OCHW if to_filters else None), None


_conv_blocked.register_autograd(_gradients, setup_context=_save)
