"""Do the loaders give the same images? On a whole data set, read back from the pixels that they give.

    python bench/loaders_agree.py --data PATH --out bench/records/DATE-loaders-agree/result.json

1. Without augmentation: the digest of all training images and labels, against that of the data set.
2. With crop and flip: every image is matched with its 25 shifts and both sides, which gives the histogram of offsets
   and the share that is mirrored; mean and deviation of each channel at each position, against the first loader's.
3. The bits of two epochs, with 1 and 2 workers, twice each. 4. The orders of 100 epochs of seeds 0 and 1.
"""

import argparse
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcifar.benchmarks.loaders import versions
from fastcifar.data import source
from fastcifar.data.digest import content_digest
from fastcifar.display import Display
from fastcifar.loaders import augment as aug
from fastcifar.loaders.feed import LOADERS, Feed, open_feed
from fastcifar.loaders.loader import Loader
from fastcifar.process import physical_cores, processor
from fastcifar.run import source_commit, write_atomically
from fastcifar.settings import Augment

CPU, CROP_PX = torch.device("cpu"), 2
USUAL = {"batch_size": 1000, "shuffle": True, "augment": Augment(crop_px=CROP_PX, flip="random")}
CHOICES = [(*shift, mirror) for shift in itertools.product(range(-CROP_PX, CROP_PX + 1), repeat=2) for mirror in (0, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    display = Display()
    dataset = source.load(chosen.dataset, chosen.data, display.work)

    def feed(name: str, workers: int, dtype: torch.dtype = torch.bfloat16) -> Feed:
        where = {"data": chosen.data, "progress": display.work}
        return open_feed(name, dataset, workers=workers, device=CPU, dtype=dtype, **where)

    found: dict[str, dict[str, Any]] = {}
    first: tuple[torch.Tensor, torch.Tensor] | None = None
    for name in LOADERS:
        # In float32, from which the pixel can be told.
        plain = feed(name, 2, torch.float32).loader("train", batch_size=1000)
        one, two = (feed(name, workers).loader("train", **USUAL) for workers in (1, 2))
        counts, mean_CHW, std_CHW = look_closely(two)
        first = first or (mean_CHW, std_CHW)
        found[name] = row = {
            "digest": digest(plain),
            "bits": [bits(loader) for loader in (one, two, one, two)],
            "images": len(dataset.train),
            "matched": sum(counts),
            "mirrored": sum(counts[1::2]) / len(dataset.train),
            "mean_differs_by": (mean_CHW - first[0]).abs().max().item(),
            "std_differs_by": (std_CHW - first[1]).abs().max().item(),
            "orders_shared": len(orders(one, seed=0) & orders(one, seed=1)),
            "shifts": {f"{CHOICES[i][:2]}": counts[i] + counts[i + 1] for i in range(0, len(CHOICES), 2)},
        }
        print(name, json.dumps(row | {"shifts": [*row["shifts"].values()]}))
    print("the digest of the data set:", all(row["digest"] == dataset.digests["train"] for row in found.values()))
    print("the same bits:", len({bits for row in found.values() for bits in row["bits"]}) == 1)
    about = {"machine": f"{processor()}, {physical_cores()} cores", "versions": versions(), "commit": source_commit()}
    about |= {"dataset": dataset.title, "dataset_digest": dataset.digests["train"]}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(chosen.out, json.dumps(about | {"loaders": found}, indent=2).encode())


def digest(loader: Loader) -> str:
    """The content digest of all that an epoch gives, normalisation undone."""
    mean_C, std_C, images, labels = torch.tensor(aug.MEAN_C), torch.tensor(aug.STD_C), [], []
    for x_BCHW, y_B in loader.epoch(0):
        x_BHWC = x_BCHW.permute(0, 2, 3, 1).float() * std_C + mean_C
        images.append((x_BHWC * 255).round().to(torch.uint8).numpy())
        labels.append(y_B.to(torch.uint8).numpy())
    return content_digest(np.concatenate(images), np.concatenate(labels))


def look_closely(loader: Loader) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """(how many images were shifted and mirrored in each of CHOICES; mean and deviation [C, H, W])."""
    images_NHWC, counts = torch.tensor(loader.split.images_NHWC), [0] * len(CHOICES)
    total_CHW, square_CHW = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    plain, order_N = loader.draws(0, aug.PLAIN), loader.order(0)
    for k, (x_BCHW, _) in enumerate(loader.epoch(0)):
        total_CHW += x_BCHW.double().sum(0)
        square_CHW += x_BCHW.double().square().sum(0)
        places_B = order_N[k * loader.batch_size :][: len(x_BCHW)]
        left_B = torch.ones(len(x_BCHW), dtype=torch.bool)  # an image of one colour matches many: the first counts
        for i, (down, right, mirror) in enumerate(CHOICES):
            plain.shift_N2[:], plain.mirror_N[:] = torch.tensor([down, right]), bool(mirror)
            as_if_BCHW = aug.apply(images_NHWC, places_B, plain, places_B, loader.dtype)
            same_B = (as_if_BCHW == x_BCHW).flatten(1).all(1) & left_B
            counts[i] += int(same_B.sum())
            left_B &= ~same_B
    images = len(order_N)
    mean_CHW = total_CHW / images
    return counts, mean_CHW, (square_CHW / images - mean_CHW.square()).sqrt()


def bits(loader: Loader) -> str:
    """SHA-256 of two epochs, images and labels."""
    checksum = hashlib.sha256()
    for x_BCHW, y_B in itertools.chain(loader.epoch(0), loader.epoch(1)):
        checksum.update(x_BCHW.permute(0, 2, 3, 1).view(torch.int16).numpy().tobytes() + y_B.numpy().tobytes())
    return checksum.hexdigest()


def orders(loader: Loader, seed: int) -> set[bytes]:
    """Those of 100 epochs."""
    loader.seed = seed
    return {loader.order(epoch).numpy().tobytes() for epoch in range(100)}


if __name__ == "__main__":
    main()
