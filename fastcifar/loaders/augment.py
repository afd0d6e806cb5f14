"""Augmentation: what is drawn for each image, and the one pass that applies it.

`draw` decides; `apply_torch` and `apply_numba` do the same to the pixels, bit for bit, from uint8 straight to
normalised images in the compute dtype. The first is plain indexing on any device; the second is a parallel kernel for
the CPU.

Every pixel is looked up in a table of the 256 values it can have, so normalising, changing brightness and rounding to
bfloat16 cost one load, whatever the dtype.

Shapes: N images of the data set, B of a batch, H rows, W columns, C = 3 channels, V = 256 pixel values.
"""

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from fastcifar.recipes import Augment

# Mean and standard deviation of each channel over the CIFAR-10 training set, pixel values scaled to 0..1.
MEAN_C = (0.4914, 0.4822, 0.4465)
STD_C = (0.2470, 0.2435, 0.2616)


ORDER, DRAWS, COIN = 1, 2, 3  # the independent streams of random numbers


def seeded(stream: int, seed: int, epoch: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each (stream, seed, epoch): (seed 0, epoch 1) and (seed 1, epoch 0) share nothing."""
    state = np.random.SeedSequence((stream, seed, epoch)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


@dataclass(frozen=True)
class Draws:
    """One epoch's random choices; each tensor is indexed by the image's place in the data set."""

    shift_N2: Tensor  # int64, rows then columns
    mirror_N: Tensor  # bool
    cutout_N2: Tensor  # int64, top left corner of the square, which may hang over the border
    cutout_px: int
    scale_N: Tensor  # float32: normalised pixel -> pixel * scale + offset
    offset_N: Tensor


def draw(augment: Augment, images: int, image_px: int, seed: int, epoch: int, device: torch.device | str) -> Draws:
    """Choose for every image of the data set; the same (seed, epoch, kind of device) always chooses the same."""
    generator = seeded(DRAWS, seed, epoch, device)

    def places(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (images, 2), generator=generator, device=device)

    def uniform(most: float) -> Tensor:
        return (torch.rand(images, generator=generator, device=device) * 2 - 1) * most

    shift_N2 = places(-augment.crop_px, augment.crop_px)
    # Alternating: one coin for the whole run, turned over every other epoch, so that two epochs show both sides of
    # every image (arXiv:2404.00498 measures the gain over a new coin each epoch).
    coin = seeded(COIN, seed, device=device) if augment.flip == "alternating" else generator
    mirror_N = torch.rand(images, generator=coin, device=device) < (0.0 if augment.flip == "none" else 0.5)
    if augment.flip == "alternating" and epoch % 2:
        mirror_N = ~mirror_N
    half_px = augment.cutout_px // 2
    cutout_N2 = places(-half_px, image_px - 1 - half_px)
    scale_N = 1 + uniform(augment.contrast)
    offset_N = uniform(augment.brightness / float(np.mean(STD_C)))
    return Draws(shift_N2, mirror_N, cutout_N2, augment.cutout_px, scale_N, offset_N)


def normalised_values(device: torch.device | str) -> Tensor:
    """[C, V] float32: each pixel value less the channel's mean, over its standard deviation."""
    values_V = torch.arange(256, dtype=torch.float32, device=device) / 255
    mean_C, std_C = torch.tensor(MEAN_C, device=device), torch.tensor(STD_C, device=device)
    return (values_V - mean_C[:, None]) / std_C[:, None]


def value_table(normalised_CV: Tensor, scale_B: Tensor, offset_B: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, C, V]: what each pixel value becomes, by image and channel, rounded to `dtype`."""
    return (normalised_CV * scale_B[:, None, None] + offset_B[:, None, None]).to(dtype)


def reflect(place: Tensor, side_px: int) -> Tensor:
    """Fold coordinates that fall outside 0..side_px - 1 back in, without repeating the border."""
    return (side_px - 1) - ((side_px - 1) - place.abs()).abs()


def apply_torch(images_NHWC: Tensor, ids_B: Tensor, draws: Draws, table_BCV: Tensor) -> Tensor:
    """The chosen uint8 images, shifted, mirrored, cut out and looked up: [B, 3, H, W] channels-last, the table's dtype.

    `table_BCV` may hold one table for all (B = 1). Runs on the device of the images without synchronising with the
    host.
    """
    device, side_px = images_NHWC.device, images_NHWC.size(1)
    place_P = torch.arange(side_px, device=device)
    shift_B2 = draws.shift_N2[ids_B]
    rows_BH = reflect(place_P + shift_B2[:, :1], side_px)
    columns_BW = torch.where(draws.mirror_N[ids_B, None], side_px - 1 - place_P, place_P) + shift_B2[:, 1:]
    columns_BW = reflect(columns_BW, side_px)
    pixels_BHWC = images_NHWC[ids_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]
    tables_B = torch.arange(len(ids_B), device=device) if len(table_BCV) > 1 else torch.zeros_like(ids_B)
    x_BHWC = table_BCV[tables_B[:, None, None, None], torch.arange(3, device=device), pixels_BHWC.long()]
    if draws.cutout_px:
        corner_B2 = draws.cutout_N2[ids_B]
        inside_B2P = (place_P >= corner_B2[:, :, None]) & (place_P < corner_B2[:, :, None] + draws.cutout_px)
        hole_BHW = inside_B2P[:, 0, :, None] & inside_B2P[:, 1, None, :]
        x_BHWC = x_BHWC.masked_fill(hole_BHW[..., None], 0)
    return x_BHWC.permute(0, 3, 1, 2)


def apply_numba(images_NHWC: Tensor, ids_B: Tensor, draws: Draws, table_BCV: Tensor) -> Tensor:
    """`apply_torch` for CPU tensors, one pass over the pixels, parallel over images."""
    _, height, width, channels = images_NHWC.shape
    x_BHWC = torch.empty(len(ids_B), height, width, channels, dtype=table_BCV.dtype)
    # numpy knows no bfloat16: the kernel moves bit patterns and never looks at them.
    bits = {2: torch.int16, 4: torch.int32}[table_BCV.element_size()]
    _look_up(
        images_NHWC.numpy(),
        ids_B.numpy(),
        draws.shift_N2.numpy(),
        draws.mirror_N.numpy(),
        draws.cutout_N2.numpy(),
        draws.cutout_px,
        table_BCV.view(bits).numpy(),
        x_BHWC.view(bits).numpy(),
    )
    return x_BHWC.permute(0, 3, 1, 2)


@numba.njit(parallel=True, cache=True, nogil=True)
def _look_up(images_NHWC, ids_B, shift_N2, mirror_N, cutout_N2, cutout_px, table_BCV, x_BHWC):  # pragma: no cover
    last = images_NHWC.shape[1] - 1
    for b in numba.prange(len(ids_B)):
        n = ids_B[b]
        table_CV = table_BCV[min(np.int64(b), len(table_BCV) - 1)]
        shift_row, shift_column = shift_N2[n]
        top, left = cutout_N2[n]
        for row in range(last + 1):
            source_row = last - abs(last - abs(row + shift_row))
            in_rows = top <= row < top + cutout_px
            for column in range(last + 1):
                source_column = (last - column if mirror_N[n] else column) + shift_column
                source_column = last - abs(last - abs(source_column))
                if in_rows and left <= column < left + cutout_px:
                    x_BHWC[b, row, column, :] = 0
                else:
                    for c in range(3):
                        x_BHWC[b, row, column, c] = table_CV[c, images_NHWC[n, source_row, source_column, c]]
