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


class ResidentLoader(Loader):
    """See `Loader`. On a GPU the workers are the GPU."""

    def __init__(self, split: Split, **options):
        super().__init__(split, **options)
        # Copied by numpy, which asks the kernel for huge pages: 6 to 11 % when both ran in turn (LOG.md).
        self.images_NHWC = torch.from_numpy(np.array(split.images_NHWC)).to(self.device)
        self.split_labels_N = torch.tensor(split.labels_N, device=self.device, dtype=torch.int64)

    def read(self, places_M: Tensor, draws: Draws) -> Iterator[Batch]:
        places_M, draws = places_M.to(self.device, non_blocking=True), draws.to(self.device)
        for places_B in places_M.split(self.batch_size):
            threads = numba.get_num_threads()
            numba.set_num_threads(min(self.workers, threads))
            x_BCHW = aug.apply(self.images_NHWC, places_B, draws, places_B, self.dtype)
            numba.set_num_threads(threads)
            yield x_BCHW, self.split_labels_N[places_B]
