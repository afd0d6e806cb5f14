"""The DALI loader: TFRecords read, augmented and normalised by DALI's own operators, on the CPU or the GPU.

DALI shuffles within a window and draws its own random numbers; neither is used. Its reader takes records in the order
of an index file, so each epoch gets an index in its own order, and the draws enter as arguments of the operators.

Shapes: as in `loader.py`; K batches.
"""

# DALI's type stubs know no nodes of a graph as arguments, nor that they can be indexed.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false

import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, tfrecord, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from fastcifar.data.dataset import Split
from fastcifar.errors import UsageError
from fastcifar.loaders.augment import MEAN_C, STD_C, Draws
from fastcifar.loaders.loader import Batches, Loader


class DaliLoader(Loader):
    """See `Loader`. `file` holds the records of the split in its order, `index` where each begins. Workers: threads.

    A bfloat16 batch is made from DALI's float32, a float16 one by DALI: it knows no bfloat16.
    """

    def __init__(self, split: Split, *, file: Path, index: Path, **options):
        super().__init__(split, **options)
        if self.augment.repaints:
            flag = f"--augment.{self.augment.repaints[0]}"
            raise UsageError(f"{flag}: --loader dali cannot do it, the other loaders can.", "--loader ffcv")
        self.file, self.index = file, index

    @cached_property
    def index_lines(self) -> list[str]:
        return self.index.read_text().splitlines()

    def read(self, places_M: Tensor, draws: Draws) -> Batches:
        batches = places_M.split(self.batch_size)
        # DALI's batches are all of one size: the last is filled up with the first images, which are dropped again.
        places_KB = places_M[torch.arange(len(batches) * self.batch_size) % len(places_M)].view(len(batches), -1)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        with tempfile.TemporaryDirectory() as folder:
            index = Path(folder) / "index"
            index.write_text("\n".join(self.index_lines[place] for place in places_KB.flatten().tolist()))
            pipeline = self.build(index, places_KB, draws)
            for places_B in batches:
                images, labels = pipeline.run(stream)
                # Both share DALI's memory, which it leaves alone (`exec_dynamic`) as long as the tensors live.
                x_BHWC, y_B1 = torch.from_dlpack(images.as_tensor()), torch.from_dlpack(labels.as_tensor())
                x_BCHW = x_BHWC[: len(places_B)].permute(0, 3, 1, 2).to(self.dtype)
                yield x_BCHW, y_B1[: len(places_B), 0]

    def build(self, index: Path, places_KB: Tensor, draws: Draws):
        """The pipeline that gives these images, a row a batch, in the order of the index."""
        augment, side_px = draws.augment, self.split.images_NHWC.shape[1]
        on_gpu = self.device.type == "cuda"

        def drawn(rows_N: Tensor):
            """Each image's row as an argument of an operator."""

            def batch(k: int) -> np.ndarray:  # DALI asks for some more than there are
                return rows_N[places_KB[k % len(places_KB)]].numpy()

            kind = types.FLOAT if rows_N.dtype == torch.float32 else types.INT32
            return fn.external_source(batch, dtype=kind, ndim=rows_N.ndim - 1)

        @pipeline_def(
            batch_size=self.batch_size,
            num_threads=self.workers,
            device_id=(self.device.index or 0) if on_gpu else None,
            exec_dynamic=True,
        )
        def pipeline():
            record = fn.readers.tfrecord(
                path=[str(self.file)],
                index_path=[str(index)],
                features={
                    "image": tfrecord.FixedLenFeature((), tfrecord.string, ""),
                    "label": tfrecord.FixedLenFeature([1], tfrecord.int64, -1),
                },
            )
            x_HWC = fn.reinterpret(record["image"], shape=[side_px, side_px, 3], layout="HWC")
            x_HWC = x_HWC.gpu() if on_gpu else x_HWC
            shift_2 = draws.shift_N2.int()
            if augment.crop_px and augment.border == "reflect":
                x_HWC, shift_2 = reflected(x_HWC, augment.crop_px, side_px), shift_2 + augment.crop_px
            if augment.crop_px:
                square = {"shape": [side_px, side_px], "axes": [0, 1]}
                x_HWC = fn.slice(x_HWC, start=drawn(shift_2), **square, out_of_bounds_policy="pad", fill_values=0)
            mirror = {} if augment.flip == "none" else {"mirror": drawn(draws.mirror_N.int())}
            if augment.rotate_deg:
                if mirror:
                    x_HWC, mirror = fn.flip(x_HWC, horizontal=mirror["mirror"]), {}
                turn = {"interp_type": types.INTERP_NN, "keep_size": True, "fill_value": 0}
                x_HWC = fn.rotate(x_HWC, angle=drawn(draws.angle_N), **turn)
            x_HWC = fn.crop_mirror_normalize(
                x_HWC,
                **mirror,
                **normalising(draws, drawn),
                dtype=types.FLOAT16 if self.dtype == torch.float16 else types.FLOAT,
                output_layout="HWC",
            )
            if augment.cutout_px:
                square = {"shape": [augment.cutout_px] * 2, "axes": [0, 1]}
                x_HWC = fn.erase(x_HWC, anchor=drawn(draws.cutout_N2.float()), **square, fill_value=0)
            return x_HWC, record["label"].gpu() if on_gpu else record["label"]

        return pipeline()


def reflected(x_HWC, border_px: int, side_px: int):
    """The image with `border_px` more on each side, its reflection: DALI pads with one value only."""
    far = side_px - 1 - border_px
    flipped = fn.flip(x_HWC, horizontal=0, vertical=1)
    x_HWC = fn.cat(flipped[far : side_px - 1], x_HWC, flipped[1 : 1 + border_px], axis=0)
    flipped = fn.flip(x_HWC, horizontal=1)
    return fn.cat(flipped[:, far : side_px - 1], x_HWC, flipped[:, 1 : 1 + border_px], axis=1)


def normalising(draws: Draws, drawn) -> dict:
    """Arguments of DALI's normalisation, (x - mean) / std in pixel values, brightness and contrast among them."""
    if draws.recolours:
        return {"mean": drawn(-draws.bias_NC / draws.gain_NC), "std": drawn(1 / draws.gain_NC)}
    return {"mean": [255 * mean for mean in MEAN_C], "std": [255 * std for std in STD_C]}
