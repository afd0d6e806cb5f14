"""The FFCV loader: a memory-mapped .beton file, decoded and augmented by compiled code in a thread of its own.

FFCV has no reflecting crop, no rotation, no cutout at given places, and draws its own random numbers; so one operation
of ours does all of it, from the decoded bytes to the normalised image, in a single pass.

What FFCV does by itself, and where it is prevented: it sets torch's threads to the number of its workers
(`import_ffcv`); takes its order from seed + epoch, and hangs when its thread fails (`Epoch`); waits forever for a
reader that has gone (`Epoch.stop`); writes new batches over old ones (only decoded bytes live in its buffers, labels
are copied).
"""

import queue
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import torch
from torch import Tensor

from fastcifar.data.beton import import_ffcv
from fastcifar.data.dataset import Split
from fastcifar.devices import send
from fastcifar.loaders import augment as aug
from fastcifar.loaders.augment import Draws
from fastcifar.loaders.loader import Batches, Loader

import_ffcv()

from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder  # noqa: E402
from ffcv.loader import Loader as Ffcv  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.transforms import ToTensor  # noqa: E402


class FfcvLoader(Loader):
    """See `Loader`. `file` is the .beton of the split, in its order. The workers are threads.

    On a GPU the bytes go there as they are, a quarter of a float32 image, and are augmented there. The first epoch
    compiles FFCV's code, which takes seconds.
    """

    def __init__(self, split: Split, *, file: Path, **options):
        super().__init__(split, **options)
        self.augmentation = Augmentation(self.dtype)
        self.ships_bytes = is_gpu(self.device)
        image = ToTensor() if self.ships_bytes else self.augmentation
        threads = numba.get_num_threads()
        self.ffcv = Ffcv(
            str(file),
            batch_size=self.batch_size,
            num_workers=self.workers,
            pipelines={"image": [SimpleRGBImageDecoder(), image], "label": [IntDecoder(), ToTensor()]},
            drop_last=False,
        )
        numba.set_num_threads(threads)
        self.busy = False

    def read(self, places_M: Tensor, draws: Draws) -> Batches:
        if self.busy:
            raise RuntimeError("FFCV has one set of buffers: close an epoch before the next one begins.")
        self.ffcv.batch_size, self.augmentation.draws = self.batch_size, draws
        draws = draws.to(self.device)
        self.busy, running = True, Epoch(self.ffcv, places_M.numpy().astype(np.uint64))  # type: ignore[arg-type]
        try:
            for places_B, (x, y_B1) in zip(places_M.split(self.batch_size), running, strict=True):
                x_BCHW = self.augment_there(x, places_B, draws) if self.ships_bytes else x
                yield x_BCHW, send(y_B1[:, 0].clone(), self.device)
        finally:
            running.stop()
            self.busy = False

    def augment_there(self, x_BHWC: Tensor, places_B: Tensor, draws: Draws) -> Tensor:
        """Decoded bytes, copied to the device and augmented there.

        FFCV's own copy (ToDevice) waits its turn on the GPU while FFCV may write the next bytes over these.
        """
        x_BHWC = send(x_BHWC.clone(), self.device)
        all_B = torch.arange(len(x_BHWC), device=self.device)
        return aug.apply(x_BHWC, all_B, draws, send(places_B, self.device), self.dtype)


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


class Epoch(EpochIterator):
    """FFCV's thread, in our order; what it raises is raised where its batches are read."""

    error: BaseException | None = None

    def run(self):
        try:
            super().run()
        except BaseException as error:
            self.error = error
            self.output_queue.put(None)

    def __next__(self):
        try:
            return super().__next__()
        except StopIteration:
            if self.error is not None:
                raise self.error from None
            raise

    def stop(self):
        self.close()
        while self.is_alive():  # it may be waiting for room in a queue that nobody reads any more
            with suppress(queue.Empty):
                self.output_queue.get(timeout=0.01)


class Augmentation(Operation):
    """Decoded bytes [B, H, W, 3] to augmented images [B, 3, H, W] in new memory, as `draws` says.

    FFCV compiles what it can, and compiled code keeps the draws of the first epoch. So this runs as Python between
    compiled stages, once a batch; its loop is the compiled one of `augment.apply_numba`.
    """

    draws: Draws

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def declare_state_and_memory(self, previous_state):
        return replace(previous_state, jit_mode=False, dtype=self.dtype), None

    def generate_code(self):
        def augment(images_BHWC, _, places_B):
            places_B = torch.from_numpy(places_B.astype(np.int64))
            return aug.apply(
                torch.from_numpy(images_BHWC), torch.arange(len(places_B)), self.draws, places_B, self.dtype
            )

        augment.with_indices = True
        return augment
