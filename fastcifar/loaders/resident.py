"""The resident loader: the whole data set as uint8 on the training device, batches made there.

CIFAR is 184 MB, so it fits anywhere, and nothing is copied from the host while training.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from fastcifar.data.dataset import Split
from fastcifar.devices import send
from fastcifar.loaders import augment as aug
from fastcifar.loaders.augment import Draws
from fastcifar.loaders.both_sides import BothSides
from fastcifar.loaders.loader import Batches, Loader

BATCHES_AHEAD = 2  # made at once: 0.53 us an image; one by one 0.56, four 0.55, eight, which no cache holds, 0.61


class ResidentLoader(Loader):
    """See `Loader`. On a GPU the workers are the GPU."""

    def __init__(self, split: Split, **options):
        super().__init__(split, **options)
        self.split_labels_N = torch.tensor(split.labels_N, device=self.device, dtype=torch.int64)
        self.sides = None
        if self.device.type == "cpu" and BothSides.suits(self.augment, split.images_NHWC.shape[1]):
            self.sides = BothSides(split.images_NHWC, self.augment)
        else:
            self.images_NHWC = torch.from_numpy(np.array(split.images_NHWC)).to(self.device)

    def read(self, places_M: Tensor, draws: Draws) -> Batches:
        places_M, draws = send(places_M, self.device), draws.to(self.device)
        y_M = self.split_labels_N[places_M]
        together = self.batch_size * (BATCHES_AHEAD if self.sides else 1)
        for places_A, y_A in zip(places_M.split(together), y_M.split(together), strict=True):
            threads = numba.get_num_threads()
            numba.set_num_threads(min(self.workers, threads))
            if self.sides:
                x_ACHW = self.sides.batch(places_A, draws, self.dtype)
            else:
                x_ACHW = aug.apply(self.images_NHWC, places_A, draws, places_A, self.dtype)
            numba.set_num_threads(threads)
            yield from zip(x_ACHW.split(self.batch_size), y_A.split(self.batch_size), strict=True)
