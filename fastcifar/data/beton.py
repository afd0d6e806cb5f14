"""FFCV's file: one split as raw pixels, written and read with FFCV's own code.

N images of a split, as rows of 3072 bytes.
"""

import importlib
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType, SimpleNamespace

import numpy as np

from fastcifar.data.dataset import Progress, Split
from fastcifar.data.official import ROW_BYTES
from fastcifar.errors import DataError, UsageError

INSTALL = (
    "make loaders, or: apt-get install g++ pkg-config python3-dev libopencv-dev libturbojpeg0-dev && "
    "pip install 'fastcifar[ffcv]'"
)


def import_ffcv() -> ModuleType:
    """FFCV, kept from setting torch's threads. Raises UsageError: it is not installed, or cannot be imported.

    Importing FFCV sets torch and numba to one thread, and each of its epochs sets torch's threads again, from a thread
    of its own: a training on the CPU would go on with as many threads as its loader has.
    """
    import numba
    import torch

    threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        ffcv = importlib.import_module("ffcv")
        compiler = importlib.import_module("ffcv.pipeline.compiler").Compiler
    except Exception as error:  # ImportError, OSError from a library it loads, AttributeError from too new a numpy
        raise UsageError(f"FFCV cannot be used here: {error}.", INSTALL) from error
    finally:
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])

    def set_num_threads(cls, n: int) -> None:
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        cls.num_threads = min(n, most) if n >= 1 else most
        numba.set_num_threads(cls.num_threads)

    compiler.set_num_threads = classmethod(set_num_threads)
    return ffcv


def write_beton(file: Path, split: Split, progress: Progress | None = None) -> None:
    """Write `split` in its order: the same bytes each time. Raises UsageError: no FFCV. OSError: no room."""
    ffcv = import_ffcv()

    class Rows:
        """What FFCV asks for the images one by one."""

        def __len__(self) -> int:
            return len(split)

        def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
            if progress and (i + 1) % 1000 == 0:
                progress(f"writing {file.name}", i + 1, len(split))
            return split.images_NHWC[i], int(split.labels_N[i])

    class Writer(ffcv.writer.DatasetWriter):
        """FFCV's writer, with its worker's function called here and now.

        FFCV starts a process for it and waits for that, for ever if it died (of a full disk, say); it also leaves the
        process behind when it is itself killed, and draws a bar of its own.
        """

        def prepare(self) -> None:
            super().prepare()
            self.metadata_sm.close()  # shared with nobody now, and it would outlive an error
            self.metadata_sm.unlink()
            self.metadata_sm = SimpleNamespace(buf=bytearray(self.num_samples * self.metadata_type.itemsize))

        def _write_common(self, num_samples: int, queue_content, work_fn, extra_worker_args) -> None:
            self.num_samples = num_samples
            self.prepare()
            pages = ffcv.writer.MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            chunks, allocations, done = SimpleQueue(), SimpleQueue(), ffcv.writer.Value("Q", 0)
            for chunk in (*queue_content, None):  # None is the end of the work
                chunks.put(chunk)
            shared = self.metadata_sm, self.metadata_type, self.fields, pages, done, allocations
            work_fn(chunks, *shared, *extra_worker_args)
            self.finalize(allocations.get())

    fields = {"image": ffcv.fields.RGBImageField(write_mode="raw"), "label": ffcv.fields.IntField()}
    Writer(str(file), fields, num_workers=1).from_indexed_dataset(Rows())


def read_beton(file: Path, progress: Progress | None = None) -> tuple[np.ndarray, list[int]]:
    """The images, uint8 [N, 32, 32, 3], and the labels of one file.

    Raises UsageError: no FFCV. DataError: the file is none of FFCV's, or not one of raw images of 32 x 32.
    """
    ffcv = import_ffcv()
    try:
        reader = ffcv.reader.Reader(str(file))
        kinds = [type(handler).__name__ for handler in reader.handlers.values()]
        names, metadata_N = list(reader.handlers), reader.metadata
    except OSError:
        raise
    except Exception as error:  # whatever FFCV stumbles over: AssertionError, IndexError, KeyError, MemoryError, ...
        raise DataError(f"{file} is no file of FFCV's: {type(error).__name__}: {error}.") from error
    if names != ["image", "label"] or kinds != ["RGBImageField", "IntField"]:
        found = ", ".join(f"{name} ({kind})" for name, kind in zip(names, kinds, strict=True))
        raise DataError(f"{file} holds {found or 'nothing'}, not image (RGBImageField), label (IntField).")
    if len(metadata_N) != reader.num_samples or len(metadata_N) == 0:
        raise DataError(f"{file} should hold {reader.num_samples:,} images, it describes {len(metadata_N):,}.")

    image_N, labels_N = metadata_N["f0"], metadata_N["f1"]
    odd = np.flatnonzero((image_N["mode"] != 1) | (image_N["height"] != 32) | (image_N["width"] != 32))
    if len(odd):
        mode, width, height, _ = image_N[odd[0]].tolist()
        kind = "raw" if mode == 1 else "compressed"
        raise DataError(f"{file}: image {odd[0]} is {kind}, {width} x {height} pixels; CIFAR's are raw, 32 x 32.")
    bytes_B = np.memmap(file, np.uint8, "r")
    start_N, table = image_N["data_ptr"], reader.alloc_table
    beyond = np.flatnonzero(start_N > len(bytes_B) - ROW_BYTES)
    if len(beyond):
        at = f"image {beyond[0]} is said to lie at byte {start_N[beyond[0]]:,}"
        raise DataError(f"{file}: {at}, the file has {len(bytes_B):,}.")
    # FFCV's loader copies as many bytes of each image as its table says, whatever room there is for them.
    if not np.array_equal(table["ptr"], start_N) or (table["size"] != ROW_BYTES).any():
        raise DataError(f"{file}: its table of images does not say where the images are, {ROW_BYTES} bytes each.")
    images_NP = np.empty((len(start_N), ROW_BYTES), dtype=np.uint8)
    for i, start in enumerate(start_N.tolist()):
        images_NP[i] = bytes_B[start : start + ROW_BYTES]
        if progress and (i + 1) % 10_000 == 0:
            progress(f"reading {file.name}", i + 1, len(start_N))
    return images_NP.reshape(-1, 32, 32, 3), labels_N.tolist()
