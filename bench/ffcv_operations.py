"""FFCV with its own operations beside the one operation that `fastcifar/loaders/ffcv.py` gives it, on the CPU.

    python bench/ffcv_operations.py --data PATH --out bench/records/DATE-ffcv-operations/result.json

FFCV's own: shift onto a grey border, mirror, normalise to float32, drawn by FFCV, then bfloat16 channels-last. Ours:
shift with reflection, mirror, normalise, drawn by seed and epoch. Full epochs of the training images, in turn.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from fastcifar.process import set_threads, tune_allocator

tune_allocator()
set_threads()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from fastcifar.benchmarks.loaders import versions  # noqa: E402
from fastcifar.data import source  # noqa: E402
from fastcifar.display import Display  # noqa: E402
from fastcifar.loaders.augment import MEAN_C, STD_C  # noqa: E402
from fastcifar.loaders.feed import open_feed  # noqa: E402
from fastcifar.process import physical_cores, processor  # noqa: E402
from fastcifar.run import source_commit, write_atomically  # noqa: E402
from fastcifar.settings import Augment  # noqa: E402

BATCH, ROUNDS = 1000, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    display = Display()
    dataset = source.load("cifar10", chosen.data, display.work)
    epochs = {}
    for workers in sorted({1, physical_cores()}):
        where = {"workers": workers, "device": torch.device("cpu"), "dtype": torch.bfloat16, "data": chosen.data}
        feed = open_feed("ffcv", dataset, **where)
        assert feed.pack is not None
        ours = feed.loader("train", batch_size=BATCH, shuffle=True, augment=Augment(crop_px=2, flip="random"))
        theirs = own_operations(feed.pack.file("train.beton"), workers)
        epochs["ours", workers] = ours.epoch
        epochs["FFCV's own", workers] = lambda epoch, theirs=theirs: theirs
    rates = {key: [] for key in epochs}
    for epoch in range(ROUNDS + 1):
        for key, batches in epochs.items():
            began_s, images = time.perf_counter(), 0
            for x_BCHW, _ in batches(epoch):
                assert x_BCHW.dtype == torch.bfloat16
                assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
                images += len(x_BCHW)
            if epoch:
                rates[key].append(images / (time.perf_counter() - began_s))
    rows = [
        {"operations": name, "workers": workers, "images_per_s": statistics.median(seen), "epochs": seen}
        for (name, workers), seen in rates.items()
    ]
    about = {"machine": f"{processor()}, {physical_cores()} cores", "versions": versions(), "commit": source_commit()}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(chosen.out, json.dumps(about | {"batch_size": BATCH, "rows": rows}, indent=2).encode())
    for row in rows:
        print(f"{row['operations']:12} {row['workers']} workers {row['images_per_s']:10,.0f} images/s")


def own_operations(file: Path, workers: int):
    """The pipeline of FFCV's CIFAR example, as far as it runs without a GPU."""
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        Convert,
        NormalizeImage,
        RandomHorizontalFlip,
        RandomTranslate,
        Squeeze,
        ToTensor,
        ToTorchImage,
    )

    mean_C, std_C = 255 * np.array(MEAN_C), 255 * np.array(STD_C)
    image = [
        SimpleRGBImageDecoder(),
        RandomHorizontalFlip(),
        RandomTranslate(padding=2, fill=(125, 123, 114)),
        NormalizeImage(mean_C, std_C, np.float32),  # type: ignore[arg-type]
        ToTensor(),
        ToTorchImage(),
        Convert(torch.bfloat16),
    ]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]}
    return Loader(
        str(file), batch_size=BATCH, num_workers=workers, order=OrderOption.RANDOM, pipelines=pipelines, seed=0
    )


if __name__ == "__main__":
    main()
