"""The images of a CPU's resident loader: both sides of each, so that no row is ever read backwards.

Without rotation, a row of an augmented image is a row of one side or the other, moved and normalised: whole vectors at
a time. That makes an image in 0.6 us on two cores, where `augment.apply_numba` takes 1.3 (LOG.md); the other sides take
154 MB.

Shapes: N images of the data set, B of a batch, I of a piece, S sides, X = 3 x places along a row, Y = X x rows of one
image, C = 3 channels.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from fastcifar.loaders.augment import Draws, source_place
from fastcifar.settings import Augment
from fastcifar_kernels.loops import as_array, narrow, prefetch

PIECE_IMAGES = 32  # that a thread takes at once: 4 % faster than 8, 16 or 64
LINE_BYTES = 64  # of memory that the processor fetches at once
MEAN_COLOUR_C = np.zeros(3, np.float32)  # normalised


class BothSides:
    """Images [N, H, W, 3] uint8 on the CPU, to be augmented as `suits` allows."""

    @staticmethod
    def suits(augment: Augment, side_px: int) -> bool:
        """No rotation, no new bytes, and no shift so far that what it reflects has left the image."""
        return not augment.rotate_deg and not augment.repaints and 2 * augment.crop_px < side_px

    def __init__(self, images_NHWC: np.ndarray, augment: Augment):
        mirrors = augment.flip != "none"
        self.side_px = images_NHWC.shape[1]
        # Filled by numpy, which asks the kernel for huge pages: 6 to 11 % when both ran in turn (LOG.md).
        self.sides_SNHWC = np.empty((1 + mirrors, *images_NHWC.shape), np.uint8)
        self.sides_SNHWC[0] = images_NHWC
        if mirrors:
            _mirror(images_NHWC, self.sides_SNHWC[1])

    def batch(self, places_B: Tensor, draws: Draws, dtype: torch.dtype) -> Tensor:
        """What `augment.apply` makes of these images, to the bit."""
        kernel_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        x_BHWC = torch.empty(len(places_B), self.side_px, self.side_px, 3, dtype=kernel_dtype)
        colours = len(draws.gain_NC) if draws.recolours else 1  # without, one row stands for all
        holes = len(draws.cutout_N2) if draws.augment.cutout_px else 1
        _augment(
            self.sides_SNHWC.reshape(*self.sides_SNHWC.shape[:2], -1),
            self.side_px,
            places_B.numpy(),
            draws.shift_N2.numpy(),
            draws.mirror_N.numpy(),
            draws.gain_NC[:colours].numpy(),
            draws.bias_NC[:colours].numpy(),
            draws.cutout_N2[:holes].numpy(),
            draws.recolours,
            draws.augment.border == "reflect",
            draws.augment.cutout_px,
            as_array(x_BHWC).reshape(len(places_B), -1),
        )
        return x_BHWC.to(dtype).permute(0, 3, 1, 2)


@numba.njit(parallel=True, cache=True, nogil=True)
def _mirror(images_NHWC, mirrored_NHWC):  # pragma: no cover
    """50,000 in 0.1 s, where a reversed view of numpy's takes 0.25; with memory new from the kernel 0.2 and 0.55."""
    images, height, width, channels = images_NHWC.shape
    for n in numba.prange(images):
        for row in range(height):
            for x in range(width):
                for c in range(channels):
                    mirrored_NHWC[n, row, width - 1 - x, c] = images_NHWC[n, row, x, c]


@numba.njit(parallel=True, cache=True, nogil=True)
def _augment(
    sides_SNY, side, places_B, shift_N2, mirror_N, gain_NC, bias_NC, cutout_N2, recolours, reflects, cutout_px, x_BY
):  # pragma: no cover
    batch, line = len(places_B), 3 * side
    for piece in numba.prange((batch + PIECE_IMAGES - 1) // PIECE_IMAGES):
        first_b = piece * PIECE_IMAGES
        count = min(PIECE_IMAGES, batch - first_b)
        gain_X, bias_X = np.empty(line, np.float32), np.empty(line, np.float32)
        side_I, down_I, right_I = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
        # Memory is asked for before it is needed, as a processor does not look ahead as far as the next image: here
        # what is drawn and the first line of each image of the piece, below the rest of the next image.
        for i in range(count):
            n = places_B[first_b + i]
            side_I[i], down_I[i] = mirror_N[n], shift_N2[n, 0]
            right_I[i] = -shift_N2[n, 1] if mirror_N[n] else shift_N2[n, 1]  # the other side goes the other way
            prefetch(sides_SNY[side_I[i], n], 0)  # type: ignore[call-arg]
        for i in range(count):
            n, to_Y, down, right, following = places_B[first_b + i], x_BY[first_b + i], down_I[i], right_I[i], i
            if i + 1 < count:
                following = i + 1
            from_Y, following_Y = sides_SNY[side_I[i], n], sides_SNY[side_I[following], places_B[first_b + following]]
            if recolours or i == 0:
                colour = n if recolours else 0
                for x in range(line):
                    gain_X[x], bias_X[x] = gain_NC[colour, x % 3], bias_NC[colour, x % 3]
            # From here to there, a place finds its pixel inside the image.
            top, bottom = max(0, -down), min(side, side - down)
            left, end = max(0, -right), min(side, side - right)
            fetched = 0
            for row in range(side):
                while fetched < line * (row + 1):
                    prefetch(following_Y, fetched)  # type: ignore[call-arg]
                    fetched += LINE_BYTES
                start = line * source_place(row, side, down, True) + 3 * right
                if 0 <= start <= len(from_Y) - line:
                    # A whole row, of known length: its ends come from the rows beside it, and are mended below.
                    _normalise(from_Y, start, gain_X, bias_X, to_Y, line * row, 0, 3 * side)
                else:
                    _normalise(from_Y, start, gain_X, bias_X, to_Y, line * row, 3 * left, 3 * end)
            if reflects:
                for place in range(left):
                    _copy_column(to_Y, side, 2 * left - place, place)
                for place in range(end, side):
                    _copy_column(to_Y, side, 2 * (end - 1) - place, place)
            else:
                _paint(to_Y, side, 0, top, 0, side, bias_X)
                _paint(to_Y, side, bottom, side, 0, side, bias_X)
                _paint(to_Y, side, top, bottom, 0, left, bias_X)
                _paint(to_Y, side, top, bottom, end, side, bias_X)
            if cutout_px:
                row, place = cutout_N2[n]
                _paint(to_Y, side, row, row + cutout_px, place, place + cutout_px, MEAN_COLOUR_C)


# Unsigned places: numba looks twice at an index that may be negative, and then takes numbers one by one.


@numba.njit(inline="always")
def _normalise(from_Y, from_start, gain_X, bias_X, to_Y, to_start, first, end):  # pragma: no cover
    """The part of a row from `first` to `end`."""
    for x in range(np.uint64(first), np.uint64(end)):
        y, to_y = np.uint64(from_start) + x, np.uint64(to_start) + x
        to_Y[to_y] = narrow(np.float32(from_Y[y]) * gain_X[x] + bias_X[x], to_Y[to_y])  # type: ignore[call-arg]


@numba.njit(inline="always")
def _copy_column(x_Y, side, from_place, to_place):  # pragma: no cover
    for row in range(side):
        y, to_y = np.uint64(3 * (side * row + from_place)), np.uint64(3 * (side * row + to_place))
        for c in range(np.uint64(3)):
            x_Y[to_y + c] = x_Y[y + c]


@numba.njit
def _paint(x_Y, side, top, bottom, left, end, colour_C):  # pragma: no cover
    """One colour over what of a rectangle lies inside the image."""
    for row in range(max(0, top), min(side, bottom)):
        for place in range(max(0, left), min(side, end)):
            for c in range(3):
                y = 3 * (side * row + place) + c
                x_Y[y] = narrow(colour_C[c], x_Y[y])  # type: ignore[call-arg]
