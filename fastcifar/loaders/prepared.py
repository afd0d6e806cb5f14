"""Images normalised once, for a CPU: what is left of making a batch is copying.

A shift, a mirror and a cutout only move or hide pixels. So where colours stay as they are, both sides of every image
are kept as the model wants them, and an epoch copies from them: 0.6 us an image where normalising it anew takes 1.3
(LOG.md), for four times the memory of the bytes on each side: 614 MB.

Shapes: N images of the data set, B of a batch, X = 3 x rows x columns of one image, 2 sides.
"""

from dataclasses import replace

import numba
import numpy as np
import torch
from torch import Tensor

from fastcifar.loaders import augment as aug
from fastcifar.loaders.augment import PIECE_IMAGES, PLAIN, Draws, source_place
from fastcifar.recipes import Augment
from fastcifar_kernels.loops import as_array

MEAN_COLOUR_C = np.zeros(3, np.uint16)  # normalised


def can_prepare(augment: Augment, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `augment` leaves colours and angles alone. In float32, twice as large, copying would gain nothing."""
    recolours = augment.rotate_deg or augment.brightness or augment.contrast
    return device.type == "cpu" and dtype == torch.bfloat16 and not recolours


class PreparedImages:
    """Both sides of images [N, H, W, 3] uint8, normalised, in bfloat16."""

    def __init__(self, images_NHWC: Tensor):
        images, self.shape = len(images_NHWC), images_NHWC.shape[1:]
        # Memory from numpy, which asks the kernel for huge pages.
        sides_2NHWC = torch.from_numpy(np.empty((2, *images_NHWC.shape), np.uint16)).view(torch.bfloat16)
        front = aug.draw(PLAIN, images, self.shape[0], 0, 0)
        for side_NHWC, draws in zip(sides_2NHWC, (front, replace(front, mirror_N=~front.mirror_N)), strict=True):
            aug.fill(side_NHWC, images_NHWC, torch.arange(images), draws)
        self.sides_2NX = as_array(sides_2NHWC).reshape(2, images, -1)
        self.black_C = as_array(front.bias_NC[0].to(torch.bfloat16))

    def batch(self, places_B: Tensor, draws: Draws) -> Tensor:
        """What `augment.apply` makes of these images, to the bit: [B, 3, H, W] bfloat16, channels-last."""
        x_BHWC = torch.empty(len(places_B), *self.shape, dtype=torch.bfloat16)
        _copy(
            self.sides_2NX,
            self.shape[0],
            places_B.numpy(),
            draws.shift_N2.numpy(),
            draws.mirror_N.numpy(),
            draws.cutout_N2.numpy(),
            draws.augment.border == "reflect",
            self.black_C,
            draws.augment.cutout_px,
            as_array(x_BHWC).reshape(len(places_B), -1),
        )
        return x_BHWC.permute(0, 3, 1, 2)


@numba.njit(parallel=True, cache=True, nogil=True)
def _copy(
    sides_2NX, side, places_B, shift_N2, mirror_N, cutout_N2, reflects, black_C, cutout_px, x_BX
):  # pragma: no cover
    batch, line = len(places_B), 3 * side
    for piece in numba.prange((batch + PIECE_IMAGES - 1) // PIECE_IMAGES):
        first_b, end_b = piece * PIECE_IMAGES, min((piece + 1) * PIECE_IMAGES, batch)
        rows_P = np.empty(side, np.int64)
        facts_I4 = np.empty((PIECE_IMAGES, 4), np.int64)
        # What lies anywhere in memory is asked for before the first image is copied: a processor waits for many reads
        # at once, but does not look ahead as far as the next image (0.70 -> 0.63 us an image). The first number of an
        # image is read only to have the image on its way.
        for b in range(first_b, end_b):
            n, mirrored = places_B[b], mirror_N[places_B[b]]
            facts_I4[b - first_b, 0] = mirrored
            facts_I4[b - first_b, 1] = shift_N2[n, 0]
            # The other side's shift goes the other way.
            facts_I4[b - first_b, 2] = -shift_N2[n, 1] if mirrored else shift_N2[n, 1]
            facts_I4[b - first_b, 3] = sides_2NX[1 if mirrored else 0, n, 0]
        for b in range(first_b, end_b):
            n, to_X = places_B[b], x_BX[b]
            mirrored, down, right = facts_I4[b - first_b, 0], facts_I4[b - first_b, 1], facts_I4[b - first_b, 2]
            from_X = sides_2NX[mirrored, n]
            # The rows and columns whose pixels come from inside the image, in one run, since rows are neighbours in
            # memory. What that carries over the ends of a row is written over below.
            top, bottom = max(0, -down), min(side, side - down)
            left, end = max(0, -right), min(side, side - right)
            inside = line * (bottom - top) - 3 * (side - end + left)
            _run(from_X, line * (top + down) + 3 * (left + right), to_X, line * top + 3 * left, inside)
            if reflects:
                for row in range(side):
                    rows_P[row] = source_place(row, side, down, True)
                    if not top <= row < bottom:
                        start = line * rows_P[row] + 3 * (left + right)
                        _run(from_X, start, to_X, line * row + 3 * left, 3 * (end - left))
                for place in range(left):
                    _column(from_X, rows_P, source_place(place, side, right, True), to_X, place)
                for place in range(end, side):
                    _column(from_X, rows_P, source_place(place, side, right, True), to_X, place)
            else:
                _paint(to_X, side, 0, top, 0, side, black_C)
                _paint(to_X, side, bottom, side, 0, side, black_C)
                _paint(to_X, side, top, bottom, 0, left, black_C)
                _paint(to_X, side, top, bottom, end, side, black_C)
            if cutout_px:
                row, place = cutout_N2[n]
                _paint(to_X, side, row, row + cutout_px, place, place + cutout_px, MEAN_COLOUR_C)


@numba.njit(inline="always")
def _run(from_X, from_start, to_X, to_start, count):  # pragma: no cover
    """Copy `count` neighbours. Unsigned: numba looks twice at an index that may be negative, one by one."""
    for x in range(np.uint64(count)):
        to_X[np.uint64(to_start) + x] = from_X[np.uint64(from_start) + x]


@numba.njit(inline="always")
def _column(from_X, rows_P, from_place, to_X, place):  # pragma: no cover
    """Copy one place of every row."""
    side = len(rows_P)
    for row in range(side):
        from_x, to_x = np.uint64(3 * (side * rows_P[row] + from_place)), np.uint64(3 * (side * row + place))
        for c in range(3):
            to_X[to_x + np.uint64(c)] = from_X[from_x + np.uint64(c)]


@numba.njit
def _paint(to_X, side, top, bottom, left, end, colour_C):  # pragma: no cover
    """One colour over what of a rectangle lies inside the image."""
    for row in range(max(0, top), min(side, bottom)):
        for place in range(max(0, left), min(side, end)):
            for c in range(3):
                to_X[3 * (side * row + place) + c] = colour_C[c]
