"""The contract of every loader, and all that they share: the order of an epoch and what is drawn for each image.

The libraries beneath have random numbers of their own; none of them is used. Order and augmentation are drawn here, on
the CPU, from (seed, epoch) alone, and each loader shows what it is told to. So they all give the same batches, however
many workers they run and wherever an epoch is taken up again.

Shapes: N images of the loader, B of a batch, M of any number, C channels, H rows, W columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing

import torch
from torch import Tensor

from fastcifar.data.dataset import Split
from fastcifar.loaders import augment as aug
from fastcifar.loaders.augment import PLAIN, Draws
from fastcifar.resize import resize
from fastcifar.settings import Augment

Batch = tuple[Tensor, Tensor]
Batches = Generator[Batch, None, None]


class Loader(ABC):
    """Batches of one split: images [B, 3, H, W], channels-last, normalised, in `dtype`, and labels [B] int64.

    Both are on `device` and stay as they are when the next batch is made. Training (`shuffle=True`): a new order and
    new draws each epoch; the incomplete last batch is left out. Evaluation (`shuffle=False`): every image once, in the
    order of the split.

    Args:
        image_px: the size that images are resized to after all else; as they are if None.
        places_N: which images of the split, int64 on the CPU; all if None.
        workers: threads or processes that make batches on the CPU.
        part: (rank, ranks): this loader's batches are these parts of batches that are larger by the number of ranks.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        augment: Augment = PLAIN,
        image_px: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        places_N: Tensor | None = None,
        workers: int = 1,
        part: tuple[int, int] = (0, 1),
    ):
        self.split, self.batch_size, self.dtype, self.device = split, batch_size, dtype, device
        self.augment, self.image_px = augment, image_px or split.images_NHWC.shape[1]
        self.shuffle, self.seed, self.workers = shuffle, seed, workers
        self.rank, self.ranks = part
        self.places_N = torch.arange(len(split)) if places_N is None else places_N
        self.labels_N = torch.tensor(split.labels_N)[self.places_N].to(device, torch.int64)

    def __len__(self) -> int:
        """Batches an epoch."""
        images = len(self.places_N)
        return images // (self.ranks * self.batch_size) if self.shuffle else -(-images // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The places of the images in the order of this epoch, int64 [N]."""
        if not self.shuffle:
            return self.places_N
        generator = aug.seeded(aug.ORDER, self.seed, epoch)
        return self.places_N[torch.randperm(len(self.places_N), generator=generator)]

    def draws(self, epoch: int, augment: Augment) -> Draws:
        """What is drawn for each image of the whole split, whether it is this loader's or not."""
        return aug.draw(augment, len(self.split), self.split.images_NHWC.shape[1], self.seed, epoch)

    def epoch(self, epoch: int, first_batch: int = 0) -> Batches:
        """The batches of one epoch from `first_batch` on, which are the same however the earlier ones were made."""
        if first_batch >= len(self):
            return (batch for batch in ())
        together = self.ranks * self.batch_size
        places_M = self.order(epoch)[first_batch * together : len(self) * together]
        if self.ranks > 1:
            places_M = places_M.view(-1, self.ranks, self.batch_size)[:, self.rank].flatten()
        return self.resized(self.read(places_M, self.draws(epoch, self.augment)))

    def resized(self, batches: Batches) -> Batches:
        with closing(batches):
            for x_BCHW, y_B in batches:
                yield resize(x_BCHW, self.image_px), y_B

    def take(self, ids_M: Tensor) -> Tensor:
        """The images at these places of `labels_N`, at least one, without augmentation: [M, 3, H, W]."""
        places_M = self.places_N[ids_M.cpu()]
        x_BCHW = torch.cat([x_BCHW for x_BCHW, _ in self.resized(self.read(places_M, self.draws(0, PLAIN)))])
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    @abstractmethod
    def read(self, places_M: Tensor, draws: Draws) -> Batches:
        """Batches of the images at these places (at least one) of the split, in this order, as drawn for each.

        The last may be short. An iterator that is closed before its end releases what it holds.
        """
