"""The resident loader: the whole data set as uint8 on the training device, batches made there.

CIFAR is 184 MB, so it fits anywhere, and nothing is copied from the host while training.

Shapes: N images, B of a batch, C channels, H rows, W columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcifar.data.dataset import Split
from fastcifar.loaders import augment as aug
from fastcifar.recipes import Augment

PLAIN = Augment(crop_px=0, flip="none")


class ResidentLoader:
    """Batches of one split: images [B, 3, H, W], channels-last, normalised, in `dtype`, and labels [B] int64.

    Training (`shuffle=True`): a new order and new draws each epoch, fixed by (seed, epoch); the incomplete last batch
    is left out. Evaluation (`shuffle=False`): every image once, in the order of the split.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        augment: Augment = PLAIN,
        shuffle: bool = False,
        seed: int = 0,
    ):
        self.images_NHWC = torch.tensor(split.images_NHWC, device=device)
        self.labels_N = torch.tensor(split.labels_N, device=device, dtype=torch.int64)
        self.batch_size, self.dtype, self.device = batch_size, dtype, device
        self.augment, self.shuffle, self.seed = augment, shuffle, seed
        self.plain_draws = aug.draw(PLAIN, len(self.labels_N), self.images_NHWC.size(1), seed, 0, device)
        self.normalised_CV = aug.normalised_values(device)
        self.plain_table = self.normalised_CV[None].to(dtype)
        self.apply = aug.apply_numba if device.type == "cpu" else torch.compile(aug.apply_torch)

    def __len__(self) -> int:
        """Batches an epoch."""
        images = len(self.labels_N)
        return images // self.batch_size if self.shuffle else -(-images // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The places of the images in the order of this epoch, int64 [N]."""
        images = len(self.labels_N)
        if not self.shuffle:
            return torch.arange(images, device=self.device)
        return torch.randperm(
            images, generator=aug.seeded(aug.ORDER, self.seed, epoch, self.device), device=self.device
        )

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from `first_batch` on, which are the same however the earlier ones were made."""
        order_N = self.order(epoch)
        draws = aug.draw(self.augment, len(order_N), self.images_NHWC.size(1), self.seed, epoch, self.device)
        for batch in range(first_batch, len(self)):
            ids_B = order_N[batch * self.batch_size : (batch + 1) * self.batch_size]
            table_BCV = self.plain_table
            if self.augment.brightness or self.augment.contrast:
                table_BCV = aug.value_table(self.normalised_CV, draws.scale_N[ids_B], draws.offset_N[ids_B], self.dtype)
            yield self.apply(self.images_NHWC, ids_B, draws, table_BCV), self.labels_N[ids_B]

    def take(self, ids_B: Tensor) -> Tensor:
        """The images at these places, without augmentation: [B, 3, H, W]."""
        return self.apply(self.images_NHWC, ids_B, self.plain_draws, self.plain_table)
