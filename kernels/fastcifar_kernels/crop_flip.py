"""Images of bytes, picked out of a data set, shifted, mirrored and normalised in one pass: a batch to train on.

Traffic: reads 1 byte a value and writes it in the type asked for, 3 bytes together in bfloat16.

A value is byte * gain + bias, rounded after the multiplication, after the addition and to the type asked for, as plain
PyTorch does it: the bits should be the same on every device (not yet compared on a GPU).

Shapes: N images of the data set, B of a batch, H rows, W columns, C = 3 channels.
"""

# triton changes what its decorator wraps:
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcifar_kernels.layout import check_companion, check_dtype, runs_triton
from fastcifar_kernels.tiles import THREAD_BYTES, WARPS

Border = Literal["reflect", "black"]


def crop_flip_reference(
    images_NHWC: Tensor,
    ids_B: Tensor,
    shift_B2: Tensor,
    mirror_B: Tensor,
    gain_BC: Tensor,
    bias_BC: Tensor,
    *,
    border: Border = "reflect",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same in plain torch: the truth the kernel is held to."""
    height, width = images_NHWC.shape[1:3]
    column_1W = torch.arange(width, device=images_NHWC.device)[None]
    row_BH = torch.arange(height, device=images_NHWC.device) + shift_B2[:, :1]
    column_BW = torch.where(mirror_B[:, None], width - 1 - column_1W, column_1W) + shift_B2[:, 1:]
    if border == "reflect":
        row_BH = (height - 1) - ((height - 1) - row_BH.abs()).abs()
        column_BW = (width - 1) - ((width - 1) - column_BW.abs()).abs()
    seen_BH, seen_BW = (row_BH >= 0) & (row_BH < height), (column_BW >= 0) & (column_BW < width)
    row_BH, column_BW = row_BH.clamp(0, height - 1), column_BW.clamp(0, width - 1)
    pixels_BHWC = images_NHWC[ids_B[:, None, None], row_BH[:, :, None], column_BW[:, None]].float()
    pixels_BHWC = pixels_BHWC * (seen_BH[:, :, None] & seen_BW[:, None])[..., None]
    x_BHWC = pixels_BHWC * gain_BC[:, None, None] + bias_BC[:, None, None]
    return x_BHWC.to(dtype).permute(0, 3, 1, 2)


def crop_flip(
    images_NHWC: Tensor,
    ids_B: Tensor,
    shift_B2: Tensor,
    mirror_B: Tensor,
    gain_BC: Tensor,
    bias_BC: Tensor,
    *,
    border: Border = "reflect",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Pick images, mirror and shift them, and normalise each of their channels. Not differentiable.

    Never waits for the device, so nobody looks whether the numbers in `ids_B` and `shift_B2` make sense. On a GPU an
    image that is not there comes out as NaN, and what is reflected from beyond the image's other side as black.

    Args:
        images_NHWC: uint8, of 3 channels; fastest contiguous, any other layout is copied first.
        ids_B: which of them, int64, from 0 to N - 1.
        shift_B2: int64, rows then columns: a pixel shows what lies so many below and right of it. At most H - 1 and
            W - 1 either way for a reflection.
        mirror_B: bool, whether left and right change sides before that.
        gain_BC, bias_BC: float32, [B, 3]: byte -> byte * gain + bias. Black is the byte 0.
        border: what comes in from outside: the image's reflection, or black.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        [B, 3, H, W], channels-last, of type `dtype`. CPU tensors take plain torch, but for Triton's interpreter.

    Raises:
        ValueError: shapes, types or devices do not belong together; another border; no images to choose from.
    """
    _check_type("images_NHWC", images_NHWC, torch.uint8)
    if images_NHWC.dim() != 4 or images_NHWC.size(3) != 3 or not images_NHWC.numel():
        raise ValueError(f"images_NHWC must be [N, H, W, 3] and not empty, has shape {tuple(images_NHWC.shape)}.")
    if ids_B.dim() != 1:
        raise ValueError(f"ids_B must have 1 dimension, has shape {tuple(ids_B.shape)}.")
    batch = ids_B.size(0)
    companions = {
        "ids_B": (ids_B, torch.int64, (batch,)),
        "shift_B2": (shift_B2, torch.int64, (batch, 2)),
        "mirror_B": (mirror_B, torch.bool, (batch,)),
    }
    for name, (tensor, wanted, shape) in companions.items():
        _check_type(name, tensor, wanted)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} beside {batch} ids, has {tuple(tensor.shape)}.")
        if tensor.device != images_NHWC.device:
            raise ValueError(f"{name} is on {tensor.device}, images_NHWC is on {images_NHWC.device}: move one of them.")
    for name, tensor in {"gain_BC": gain_BC, "bias_BC": bias_BC}.items():
        check_companion(name, tensor, (batch, 3), "images_NHWC", images_NHWC)
        _check_type(name, tensor, torch.float32)
    if border not in ("reflect", "black"):
        raise ValueError(f"border must be reflect or black, is {border}.")
    check_dtype("dtype", dtype)
    given = images_NHWC, ids_B, shift_B2, mirror_B, gain_BC.detach(), bias_BC.detach()
    return _crop_flip(*given, border == "reflect", dtype)


def _check_type(name: str, tensor: Tensor, wanted: torch.dtype) -> None:
    if tensor.dtype != wanted:
        raise ValueError(f"{name} must be {str(wanted)[6:]}, is {tensor.dtype}.")


# Triton


@triton.jit
def _source(place, side: tl.constexpr, REFLECT: tl.constexpr):
    """Where a shifted place's pixel is: outside 0 to side - 1 if nowhere."""
    return (side - 1) - tl.abs((side - 1) - tl.abs(place)) if REFLECT else place


@triton.jit
def _crop_flip_fwd_kernel(
    images_ptr, ids_ptr, shift_ptr, mirror_ptr, gain_ptr, bias_ptr, out_ptr, images,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, REFLECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A piece of one image: each thread writes 16 bytes, of values whose bytes it looks up one by one."""
    b = tl.program_id(0).to(tl.int64)
    at_X = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c_X, column_X, row_X = at_X % 3, at_X // 3 % WIDTH, at_X // (3 * WIDTH)
    if tl.load(mirror_ptr + b):
        column_X = WIDTH - 1 - column_X
    row_X = _source(row_X + tl.load(shift_ptr + 2 * b).to(tl.int32), HEIGHT, REFLECT)
    column_X = _source(column_X + tl.load(shift_ptr + 2 * b + 1).to(tl.int32), WIDTH, REFLECT)
    image_X = tl.load(ids_ptr + b) + tl.zeros((BLOCK,), tl.int64)
    there_X, inside_X = (image_X >= 0) & (image_X < images), at_X < 3 * HEIGHT * WIDTH
    seen_X = inside_X & there_X & (row_X >= 0) & (row_X < HEIGHT) & (column_X >= 0) & (column_X < WIDTH)
    from_X = image_X * (3 * HEIGHT * WIDTH) + (row_X * WIDTH + column_X) * 3 + c_X
    byte_X = tl.load(images_ptr + from_X, seen_X, 0).to(tl.float32)
    x_X = byte_X * tl.load(gain_ptr + 3 * b + c_X) + tl.load(bias_ptr + 3 * b + c_X)
    tl.store(out_ptr + b * (3 * HEIGHT * WIDTH) + at_X, tl.where(there_X, x_X, float("nan")), inside_X)


def _triton_forward(images_NHWC, ids_B, shift_B2, mirror_B, gain_BC, bias_BC, reflect: bool, out_BHWC: Tensor) -> None:
    n, height, width, _ = images_NHWC.shape
    block = WARPS * 32 * THREAD_BYTES // out_BHWC.element_size()
    grid = ids_B.size(0), triton.cdiv(3 * height * width, block)
    # A multiplication and an addition fused would round once, and give other bits than plain torch.
    _crop_flip_fwd_kernel[grid](
        images_NHWC, ids_B, shift_B2, mirror_B.view(torch.uint8), gain_BC, bias_BC, out_BHWC, n,
        HEIGHT=height, WIDTH=width, REFLECT=reflect, BLOCK=block, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


# The operator


@torch.library.custom_op("fastcifar_kernels::crop_flip", mutates_args=())
def _crop_flip(
    images_NHWC: Tensor,
    ids_B: Tensor,
    shift_B2: Tensor,
    mirror_B: Tensor,
    gain_BC: Tensor,
    bias_BC: Tensor,
    reflect: bool,
    dtype: torch.dtype,
) -> Tensor:
    given = images_NHWC, ids_B, shift_B2, mirror_B, gain_BC, bias_BC
    if not runs_triton(images_NHWC):
        out_BCHW = crop_flip_reference(*given, border="reflect" if reflect else "black", dtype=dtype)
        return out_BCHW.contiguous(memory_format=torch.channels_last)
    out_BCHW = _empty(*given, reflect, dtype)
    if out_BCHW.numel():
        with torch.cuda.device_of(images_NHWC):
            _triton_forward(*[tensor.contiguous() for tensor in given], reflect, out_BCHW.permute(0, 2, 3, 1))
    return out_BCHW


@_crop_flip.register_fake
def _empty(images_NHWC, ids_B, shift_B2, mirror_B, gain_BC, bias_BC, reflect, dtype):
    size = (ids_B.size(0), *images_NHWC.shape[1:])
    return torch.empty(size, dtype=dtype, device=images_NHWC.device).permute(0, 3, 1, 2)
