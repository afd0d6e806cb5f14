"""The loader that people know: a map-style data set, torchvision's transforms one image at a time, a DataLoader."""

import signal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from fastcifar.data.dataset import Split
from fastcifar.data.download import import_torchvision
from fastcifar.loaders.augment import MEAN_C, STD_C, Draws
from fastcifar.loaders.loader import Batches, Loader

import_torchvision()

from torchvision.transforms.v2 import functional as transform  # noqa: E402


class TorchLoader(Loader):
    """See `Loader`. The workers are processes, as DataLoader's are; started anew for each epoch, which takes 0.1 s."""

    def read(self, places_M: Tensor, draws: Draws) -> Batches:
        batches = DataLoader(
            Drawn(self.split, draws),
            batch_size=self.batch_size,
            sampler=places_M.tolist(),  # type: ignore[arg-type]
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=outlive_sigterm,
            generator=torch.Generator(),  # its workers draw nothing, and the global one is dropout's
        )
        for x_BCHW, y_B in batches:
            x_BCHW, y_B = (part.to(self.device, non_blocking=True) for part in (x_BCHW, y_B))
            # Only then: another type or layout on the way is made on the CPU, in memory that is not pinned.
            yield x_BCHW.to(self.dtype, memory_format=torch.channels_last), y_B


def outlive_sigterm(worker: int) -> None:
    """A SIGTERM to the whole group is for the training to answer, with a checkpoint; its end ends the workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Drawn(MapDataset):
    """Image n of the split, as `draws` says: (float32 [3, H, W], label)."""

    def __init__(self, split: Split, draws: Draws):
        self.split, self.draws = split, draws

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        draws, augment = self.draws, self.draws.augment
        image_HWC = torch.from_numpy(self.split.images_NHWC[place].copy())
        if augment.repaints:
            image_HWC = draws.repaint(image_HWC[None], torch.tensor([place]))[0]
        x_CHW = image_HWC.permute(2, 0, 1).contiguous()
        side_px = x_CHW.shape[1]
        if augment.crop_px:
            mode = "reflect" if augment.border == "reflect" else "constant"
            x_CHW = transform.pad(x_CHW, [augment.crop_px], padding_mode=mode)
            top, left = (draws.shift_N2[place] + augment.crop_px).tolist()
            x_CHW = transform.crop(x_CHW, top, left, side_px, side_px)
        if draws.mirror_N[place]:
            x_CHW = transform.horizontal_flip(x_CHW)
        if augment.rotate_deg:
            x_CHW = transform.rotate(x_CHW, draws.angle_N[place].item())
        x_CHW = transform.normalize(transform.to_dtype(x_CHW, torch.float32, scale=True), [*MEAN_C], [*STD_C])
        if draws.recolours:
            x_CHW = x_CHW * draws.scale_N[place] + draws.offset_N[place]
        if augment.cutout_px:
            top, left = draws.cutout_N2[place].tolist()
            bottom, right = top + augment.cutout_px, left + augment.cutout_px
            top, left = max(0, top), max(0, left)
            x_CHW = transform.erase(x_CHW, top, left, bottom - top, right - left, torch.zeros(()), inplace=True)
        return x_CHW, int(self.split.labels_N[place])
