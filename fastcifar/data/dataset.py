"""What every source of images becomes: a `Dataset` of two `Split`s.

N images of a split, H = W = 32, C = 3 channels (red, green, blue).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "test")

# Called as progress("reading PNGs", done, total) during what takes seconds.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Split:
    """images_NHWC: uint8 [N, 32, 32, 3]. labels_N: uint8 [N]. Both read-only, usually views of the cache file."""

    images_NHWC: np.ndarray
    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set ready to train on.

    Images are ordered by the SHA-256 of label and pixels, not as in the source: so every packaging of the same images
    gives the same arrays, a seed means the same run on all of them, and no loader meets them class by class.
    """

    name: str  # "cifar10"
    title: str  # "CIFAR-10", or "not CIFAR-10" when any image, label or class name is not the official one
    train: Split
    test: Split
    class_names: tuple[str, ...]
    verified: bool  # it is the official CIFAR, image by image; never true of shapes10
    warning: str  # why the title says "not", else empty
    digests: dict[str, str]  # split -> order-independent SHA-256, see digest.py
    mean_C: tuple[float, ...]  # of the training images, pixel values in 0..1
    std_C: tuple[float, ...]
    origin: str  # where it came from, for people
    cache_file: Path | None = None


@dataclass(frozen=True, eq=False)
class RawSplit:
    """A split as its source has it, in the source's order; `where(i)` tells a person which file holds image i."""

    images_NHWC: np.ndarray
    labels_N: np.ndarray
    where: Callable[[int], str]


@dataclass(frozen=True, eq=False)
class Raw:
    """What a packaging holds, before anyone asked whether it is CIFAR."""

    splits: dict[str, RawSplit]
    class_names: tuple[str, ...]


def pixel_statistics(images_NHWC: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixel values in 0..1; sums of whole numbers, so exact."""
    total_HWC = np.zeros(images_NHWC.shape[1:], dtype=np.uint64)
    squares_HWC = np.zeros_like(total_HWC)
    for first in range(0, len(images_NHWC), 500):  # 500 images of uint32 are 6 MB; 500 x 255^2 fits easily
        chunk_NHWC = images_NHWC[first : first + 500].astype(np.uint32)
        total_HWC += chunk_NHWC.sum(axis=0, dtype=np.uint32)
        squares_HWC += (chunk_NHWC * chunk_NHWC).sum(axis=0, dtype=np.uint32)
    n_pixels = images_NHWC.size // 3
    mean_C = [int(total) / n_pixels for total in total_HWC.sum(axis=(0, 1))]
    square_C = [int(square) / n_pixels for square in squares_HWC.sum(axis=(0, 1))]
    std_C = [(square - mean * mean) ** 0.5 for mean, square in zip(mean_C, square_C, strict=True)]
    return tuple(mean / 255 for mean in mean_C), tuple(std / 255 for std in std_C)
