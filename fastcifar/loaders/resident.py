"""The resident loader: the whole data set as uint8 on the training device, batches made there.

CIFAR is 184 MB, so it fits anywhere, and nothing is copied from the host while training.
"""

from collections.abc import Iterator

import numba
import numpy as np
import torch
from torch import Tensor

from fastcifar.data.dataset import Split
from fastcifar.loaders import augment as aug
from fastcifar.loaders.augment import Draws
from fastcifar.loaders.loader import Batch, Loader
from fastcifar.loaders.prepared import PreparedImages, can_prepare

BATCHES_AHEAD = 2  # copied at once: 0.70 us an image, one by one 0.78, four 0.72, eight 0.74 (LOG.md)


class ResidentLoader(Loader):
    """See `Loader`. On a GPU the workers are the GPU."""

    def __init__(self, split: Split, **options):
        super().__init__(split, **options)
        self.split_labels_N = torch.tensor(split.labels_N, device=self.device, dtype=torch.int64)
        # Copied by numpy, which asks the kernel for huge pages: 6 to 11 % when both ran in turn (LOG.md).
        images_NHWC = torch.from_numpy(np.array(split.images_NHWC))
        if self.shuffle and can_prepare(self.augment, self.dtype, self.device):
            self.batch, self.ahead = PreparedImages(images_NHWC).batch, BATCHES_AHEAD
        else:
            self.images_NHWC = images_NHWC.to(self.device)
            self.batch, self.ahead = self.augmented, 1

    def augmented(self, places_B: Tensor, draws: Draws) -> Tensor:
        return aug.apply(self.images_NHWC, places_B, draws, places_B, self.dtype)

    def read(self, places_M: Tensor, draws: Draws) -> Iterator[Batch]:
        places_M, draws = places_M.to(self.device, non_blocking=True), draws.to(self.device)
        y_M = self.split_labels_N[places_M]
        together = self.batch_size * self.ahead
        for places_A, y_A in zip(places_M.split(together), y_M.split(together), strict=True):
            threads = numba.get_num_threads()
            numba.set_num_threads(min(self.workers, threads))
            x_ACHW = self.batch(places_A, draws)
            numba.set_num_threads(threads)
            yield from zip(x_ACHW.split(self.batch_size), y_A.split(self.batch_size), strict=True)
