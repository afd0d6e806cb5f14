"""Augmentation: what is drawn for each image, and the one pass that applies it.

`draw` decides, for every loader: so they all show a model the same pictures. `apply` then makes a batch of uint8 images
normalised images in the compute dtype, by `apply_torch`, plain indexing on any device, `apply_numba`, a parallel kernel
for the CPU, or `apply_kernel`, one for a GPU that neither rotates nor cuts out. On a CPU the first two give the same
bits; the third gives them in Triton's interpreter.

Policies, saturation and hue come first, in `repaint.py`, from bytes to bytes.

Normalising, brightness and contrast come down to one multiplication and one addition for each channel of an image. A
rotated pixel's source is found in whole numbers, 1/65536 of half a pixel each: no device rounds those in its own way.

Shapes: N images of the data set, B of a batch, H rows, W columns, P places along either, C = 3 channels.
"""

from dataclasses import dataclass, fields, replace
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from fastcifar.devices import send
from fastcifar.loaders.repaint import draw_strokes, repaint
from fastcifar.settings import Augment
from fastcifar_kernels import crop_flip
from fastcifar_kernels.loops import as_array, narrow

# Mean and standard deviation of each channel over the CIFAR-10 training set, pixel values scaled to 0..1.
MEAN_C = (0.4914, 0.4822, 0.4465)
STD_C = (0.2470, 0.2435, 0.2616)

PLAIN = Augment(crop_px=0, flip="none")
ORDER, DRAWS, COIN = 1, 2, 3  # the independent streams of random numbers
TURN_BITS = 16  # a sine is a whole number of 1/65536
PIECE_IMAGES = 16  # that a thread of the numba kernel takes at once: its small arrays are made once for them all


def seeded(stream: int, seed: int, epoch: int = 0) -> torch.Generator:
    """A generator of its own for each (stream, seed, epoch): (seed 0, epoch 1) and (seed 1, epoch 0) share nothing."""
    state = np.random.SeedSequence((stream, seed, epoch)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@dataclass(frozen=True)
class Draws:
    """Random choices, a row an image: for an epoch, by its place in the data set; for a batch, in the batch's order.

    What a recipe does without is the same row for all, in the memory of one.
    """

    augment: Augment
    shift_N2: Tensor  # int64, rows then columns
    mirror_N: Tensor  # bool
    turn_N2: Tensor  # int64, cosine and sine of the angle in 1/65536; counterclockwise
    angle_N: Tensor  # float32, the same in degrees
    scale_N: Tensor  # float32, of contrast: normalised pixel -> pixel * scale + offset
    offset_N: Tensor  # of brightness
    gain_NC: Tensor  # float32, of all that: pixel 0..255 -> pixel * gain + bias, normalised and recoloured
    bias_NC: Tensor
    cutout_N2: Tensor  # int64, top left corner of the square, which may hang over the border
    strokes_N2: Tensor  # int64, of the policy
    saturation_N: Tensor  # float32, what the distance from grey is multiplied by
    hue_N: Tensor  # float32, in turns of the colour wheel

    def _each(self, change) -> "Draws":
        names = [field.name for field in fields(self) if field.name != "augment"]
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def pick(self, ids_B: Tensor) -> "Draws":
        """Those of the images at these places."""
        return self._each(lambda rows: rows[ids_B])

    def to(self, device: torch.device) -> "Draws":
        """The same there. What is one row for all travels as one: of the 5 MB of an epoch 1 is left."""
        return self._each(lambda rows: send(rows, device) if rows.stride(0) else send(rows[:1], device).expand_as(rows))

    def repaint(self, images_BHWC: Tensor, places_B: Tensor) -> Tensor:
        """These images, bytes, after what `augment.repaints` names."""
        drawn = self.strokes_N2[places_B], self.saturation_N[places_B], self.hue_N[places_B]
        return repaint(images_BHWC, self.augment, *drawn)

    @property
    def recolours(self) -> bool:
        return bool(self.augment.brightness or self.augment.contrast)


def draw(augment: Augment, images: int, image_px: int, seed: int, epoch: int) -> Draws:
    """Choose for every image of the data set, on the CPU; the same (seed, epoch) always chooses the same."""
    generator = seeded(DRAWS, seed, epoch)

    def places(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (images, 2), generator=generator)

    def uniform(most: float) -> Tensor:
        return (torch.rand(images, generator=generator) * 2 - 1) * most

    def same(row: Tensor) -> Tensor:
        return row.expand(images, *row.shape)

    shift_N2 = places(-augment.crop_px, augment.crop_px)
    # Alternating: one coin for the whole run, turned over every other epoch, so that two epochs show both sides of
    # every image (arXiv:2404.00498 measures the gain over a new coin each epoch).
    coin = seeded(COIN, seed) if augment.flip == "alternating" else generator
    mirror_N = torch.rand(images, generator=coin) < (0.0 if augment.flip == "none" else 0.5)
    if augment.flip == "alternating" and epoch % 2:
        mirror_N = ~mirror_N
    half_px = augment.cutout_px // 2
    # To draw what a recipe does without would take 0.03 us an image, where making one takes 0.6.
    cutout_N2 = places(-half_px, image_px - 1 - half_px) if augment.cutout_px else same(torch.zeros(2).long())
    scale_N, offset_N = same(torch.ones(())), same(torch.zeros(()))
    gain_C, bias_C = 1 / (255 * torch.tensor(STD_C)), -torch.tensor(MEAN_C) / torch.tensor(STD_C)
    gain_NC, bias_NC = same(gain_C), same(bias_C)
    if augment.brightness or augment.contrast:
        scale_N = 1 + uniform(augment.contrast)
        offset_N = uniform(augment.brightness / float(np.mean(STD_C)))
        gain_NC, bias_NC = gain_C * scale_N[:, None], bias_C * scale_N[:, None] + offset_N[:, None]
    angle_N, turn_N2 = same(torch.zeros(())), same(torch.tensor([1 << TURN_BITS, 0]))
    if augment.rotate_deg:
        angle_N = uniform(augment.rotate_deg)
        turn_N2 = torch.stack([angle_N.deg2rad().cos(), angle_N.deg2rad().sin()], dim=1)
        turn_N2 = (turn_N2.double() * 2**TURN_BITS).round().long()
    strokes_N2 = same(torch.zeros(2).long())
    if augment.policy != "none":
        strokes_N2 = draw_strokes(augment.policy, images, image_px, generator)
    saturation_N = 1 + uniform(augment.saturation) if augment.saturation else same(torch.ones(()))
    hue_N = uniform(augment.hue) if augment.hue else same(torch.zeros(()))
    geometry, colour = (shift_N2, mirror_N, turn_N2, angle_N), (scale_N, offset_N, gain_NC, bias_NC)
    return Draws(augment, *geometry, *colour, cutout_N2, strokes_N2, saturation_N, hue_N)


def apply(images_NHWC: Tensor, ids_B: Tensor, draws: Draws, places_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Images of uint8, augmented: [B, 3, H, W] channels-last in `dtype`, on their device.

    Never waits for that device, unless there is a policy.

    Args:
        ids_B: which of `images_NHWC`, int64.
        draws: of the epoch; `places_B`: which of them, int64. All on the device of the images.
    """
    if draws.augment.repaints:
        images_NHWC = draws.repaint(images_NHWC[ids_B], places_B)
        ids_B = torch.arange(len(ids_B), device=ids_B.device)
    if images_NHWC.device.type == "cpu":
        how = apply_numba
    elif draws.augment.rotate_deg or draws.augment.cutout_px:  # which the kernel does not know
        how = _compiled()
    else:
        how = apply_kernel
    return how(images_NHWC, ids_B, draws, places_B, dtype)


@cache
def _compiled():
    return torch.compile(apply_torch)


def apply_kernel(images_NHWC: Tensor, ids_B: Tensor, draws: Draws, places_B: Tensor, dtype: torch.dtype) -> Tensor:
    """`apply` without rotation and cutout, in one Triton kernel on a GPU."""
    rows = draws.shift_N2, draws.mirror_N, draws.gain_NC, draws.bias_NC
    drawn = [rows_N[places_B] for rows_N in rows]
    return crop_flip(images_NHWC, ids_B, *drawn, border=draws.augment.border, dtype=dtype)


def apply_torch(images_NHWC: Tensor, ids_B: Tensor, draws: Draws, places_B: Tensor, dtype: torch.dtype) -> Tensor:
    """`apply` on any device."""
    draws_B = draws.pick(places_B)
    augment, side_px = draws_B.augment, images_NHWC.size(1)
    place_P = torch.arange(side_px, device=images_NHWC.device)
    rows_BHW, columns_BHW = place_P[None, :, None], place_P[None, None, :]
    if augment.rotate_deg:
        cos_B11, sin_B11 = draws_B.turn_N2[:, 0, None, None], draws_B.turn_N2[:, 1, None, None]
        # Twice the distance from the centre, which lies between two pixels.
        down, right = 2 * rows_BHW - (side_px - 1), 2 * columns_BHW - (side_px - 1)
        rows_BHW = (cos_B11 * down + sin_B11 * right + (side_px << TURN_BITS)) >> (TURN_BITS + 1)
        columns_BHW = (cos_B11 * right - sin_B11 * down + (side_px << TURN_BITS)) >> (TURN_BITS + 1)
        seen_BHW = _within(rows_BHW, side_px) & _within(columns_BHW, side_px)
        rows_BHW, columns_BHW = rows_BHW.clamp(0, side_px - 1), columns_BHW.clamp(0, side_px - 1)
    else:
        seen_BHW = torch.ones((), dtype=torch.bool, device=images_NHWC.device)
    columns_BHW = torch.where(draws_B.mirror_N[:, None, None], side_px - 1 - columns_BHW, columns_BHW)
    rows_BHW = rows_BHW + draws_B.shift_N2[:, 0, None, None]
    columns_BHW = columns_BHW + draws_B.shift_N2[:, 1, None, None]
    if augment.border == "black":
        seen_BHW = seen_BHW & _within(rows_BHW, side_px) & _within(columns_BHW, side_px)
        rows_BHW, columns_BHW = rows_BHW.clamp(0, side_px - 1), columns_BHW.clamp(0, side_px - 1)
    pixels_BHWC = images_NHWC[ids_B[:, None, None], reflect(rows_BHW, side_px), reflect(columns_BHW, side_px)]
    pixels_BHWC = pixels_BHWC.float() * seen_BHW[..., None]
    x_BHWC = pixels_BHWC * draws_B.gain_NC[:, None, None] + draws_B.bias_NC[:, None, None]
    if augment.cutout_px:
        corner_B2 = draws_B.cutout_N2
        inside_B2P = (place_P >= corner_B2[:, :, None]) & (place_P < corner_B2[:, :, None] + augment.cutout_px)
        hole_BHW = inside_B2P[:, 0, :, None] & inside_B2P[:, 1, None, :]
        x_BHWC = x_BHWC.masked_fill(hole_BHW[..., None], 0)
    return x_BHWC.to(dtype).permute(0, 3, 1, 2)


def _within(place: Tensor, side_px: int) -> Tensor:
    return (place >= 0) & (place < side_px)


def reflect(place: Tensor, side_px: int) -> Tensor:
    """Fold coordinates that fall outside 0..side_px - 1 back in, without repeating the border."""
    return (side_px - 1) - ((side_px - 1) - place.abs()).abs()


def apply_numba(images_NHWC: Tensor, ids_B: Tensor, draws: Draws, places_B: Tensor, dtype: torch.dtype) -> Tensor:
    """`apply` for CPU tensors, in one pass over the pixels, parallel over images."""
    kernel_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    x_BHWC = torch.empty(len(ids_B), *images_NHWC.shape[1:], dtype=kernel_dtype)
    fill(x_BHWC, images_NHWC, ids_B, draws.pick(places_B))
    return x_BHWC.to(dtype).permute(0, 3, 1, 2)


def fill(x_BHWC: Tensor, images_NHWC: Tensor, ids_B: Tensor, draws_B: Draws) -> None:
    """Write augmented images over `x_BHWC`: float32 or bfloat16, contiguous, on the CPU."""
    _augment(
        images_NHWC.numpy(),
        ids_B.numpy(),
        draws_B.shift_N2.numpy(),
        draws_B.mirror_N.numpy(),
        draws_B.turn_N2.numpy(),
        draws_B.gain_NC.numpy(),
        draws_B.bias_NC.numpy(),
        draws_B.cutout_N2.numpy(),
        draws_B.augment.border == "reflect",
        draws_B.augment.rotate_deg > 0,
        draws_B.augment.cutout_px,
        as_array(x_BHWC),
    )


@numba.njit(parallel=True, cache=True, nogil=True)
def _augment(
    images_NHWC, ids_B, shift_B2, mirror_B, turn_B2, gain_BC, bias_BC, cutout_B2, reflects, turns, cutout_px, x_BHWC
):  # pragma: no cover
    batch, side = len(ids_B), images_NHWC.shape[1]
    for piece in numba.prange((batch + PIECE_IMAGES - 1) // PIECE_IMAGES):
        rows_P, columns_P = np.empty(side, np.int64), np.empty(side, np.int64)
        # A row of the augmented image. Not uint8: once FFCV was used, numba takes every row of bytes for read-only.
        line = np.empty(3 * side, np.uint16)
        gain, bias = np.empty(3 * side, np.float32), np.empty(3 * side, np.float32)
        for b in range(piece * PIECE_IMAGES, min((piece + 1) * PIECE_IMAGES, batch)):
            image_HX = images_NHWC[ids_B[b]].reshape(side, 3 * side)
            out_HX = x_BHWC[b].reshape(side, 3 * side)
            shift, mirrored = shift_B2[b, 1], mirror_B[b]
            for place in range(side):
                rows_P[place] = source_place(place, side, shift_B2[b, 0], reflects)
                columns_P[place] = source_place(side - 1 - place if mirrored else place, side, shift, reflects)
                for c in range(3):
                    gain[3 * place + c], bias[3 * place + c] = gain_BC[b, c], bias_BC[b, c]
            for row in range(side):
                if turns:
                    _turned_line(image_HX, row, rows_P, columns_P, turn_B2[b], line)
                elif rows_P[row] < 0:
                    line[:] = 0
                elif mirrored:
                    _gather(image_HX[rows_P[row]], columns_P, 0, side, line)
                else:  # all but its ends is a plain copy
                    first, end = max(0, -shift), min(side, side - shift)
                    line[3 * first : 3 * end] = image_HX[rows_P[row], 3 * (first + shift) : 3 * (end + shift)]
                    _gather(image_HX[rows_P[row]], columns_P, 0, first, line)
                    _gather(image_HX[rows_P[row]], columns_P, end, side, line)
                out_X = out_HX[row]
                for x in range(3 * side):
                    out_X[x] = narrow(np.float32(line[x]) * gain[x] + bias[x], out_X[x])  # type: ignore[call-arg]
            if cutout_px:
                top, left = max(0, cutout_B2[b, 0]), max(0, cutout_B2[b, 1])
                bottom, right = max(0, cutout_B2[b, 0] + cutout_px), max(0, cutout_B2[b, 1] + cutout_px)
                out_HX[top:bottom, 3 * left : 3 * right] = 0


@numba.njit(inline="always")
def source_place(place, side, shift, reflects):  # pragma: no cover
    """Where the shift finds this place's pixel; -1 if that is outside and black."""
    place += shift
    if reflects:
        return (side - 1) - abs((side - 1) - abs(place))
    return place if 0 <= place < side else -1


@numba.njit(inline="always")
def _gather(from_X, columns_P, first, end, line):  # pragma: no cover
    """Pixels from their columns, one by one; unsigned, since numba looks twice at an index that may be negative."""
    for place in range(first, end):
        if columns_P[place] < 0:
            line[3 * place], line[3 * place + 1], line[3 * place + 2] = 0, 0, 0
        else:
            x = np.uint64(3 * columns_P[place])
            line[3 * place] = from_X[x]
            line[3 * place + 1] = from_X[x + np.uint64(1)]
            line[3 * place + 2] = from_X[x + np.uint64(2)]


@numba.njit(inline="always")
def _turned_line(image_HX, row, rows_P, columns_P, turn_2, line):  # pragma: no cover
    """A row of a turned image: where each pixel comes from before it is shifted and mirrored."""
    side = len(rows_P)
    cos, sin = turn_2
    down = 2 * row - (side - 1)  # twice the distance from the centre, which lies between two pixels
    for place in range(side):
        right = 2 * place - (side - 1)
        from_row = (cos * down + sin * right + (side << TURN_BITS)) >> (TURN_BITS + 1)
        from_column = (cos * right - sin * down + (side << TURN_BITS)) >> (TURN_BITS + 1)
        seen = 0 <= from_row < side and 0 <= from_column < side
        if seen and rows_P[from_row] >= 0 and columns_P[from_column] >= 0:
            x = 3 * columns_P[from_column]
            for c in range(3):
                line[3 * place + c] = image_HX[rows_P[from_row], x + c]
        else:
            for c in range(3):
                line[3 * place + c] = 0
