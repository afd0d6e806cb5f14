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

import numpy as np
import torch

from fastcifar.benchmarks.loaders import versions
from fastcifar.data import source
from fastcifar.data.digest import content_digest
from fastcifar.display import Display
from fastcifar.loaders import augment as aug
from fastcifar.loaders.feed import LOADERS, Feed, open_feed
from fastcifar.loaders.loader import Loader
from fastcifar.process import physical_cores
from fastcifar.recipes import Augment
from fastcifar.report import processor
from fastcifar.run import source_commit, write_atomically

CPU, CROP_PX = torch.device("cpu"), 2
USUAL = Augment(crop_px=CROP_PX, flip="random")
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

    found, first = {}, None
    for name in LOADERS:
        loader = feed(name, 2).loader("train", batch_size=1000, shuffle=True, augment=USUAL)
        # In float32, from which the pixel can be told.
        found[name] = row = {"digest": digest(feed(name, 2, torch.float32).loader("train", batch_size=1000))}
        row["is_the_data_set"] = row["digest"] == dataset.digests["train"]
        counts, mean_CHW, std_CHW = look_closely(loader)
        row |= {
            "matched": sum(counts),
            "images": len(dataset.train),
            "mirrored": sum(counts[1::2]) / len(dataset.train),
            "shifts": {f"{CHOICES[i][:2]}": counts[i] + counts[i + 1] for i in range(0, len(CHOICES), 2)},
        }
        first = first or (mean_CHW, std_CHW)
        row["mean_differs_by"] = (mean_CHW - first[0]).abs().max().item()
        row["std_differs_by"] = (std_CHW - first[1]).abs().max().item()
        loaders = [feed(name, w).loader("train", batch_size=1000, shuffle=True, augment=USUAL) for w in (1, 2, 1, 2)]
        row["bits"] = [bits(loader) for loader in loaders]
        row["orders_shared"] = len(orders(loader, seed=0) & orders(loader, seed=1))
        print(name, json.dumps({key: value for key, value in row.items() if key != "shifts"}))
        print("  shifts:", *row["shifts"].values())
    print("the same digest:", len({row["digest"] for row in found.values()}) == 1)
    print("the same bits:", len({bits for row in found.values() for bits in row["bits"]}) == 1)
    about = {"machine": f"{processor()}, {physical_cores()} cores", "versions": versions(), "commit": source_commit()}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(chosen.out, json.dumps(about | {"dataset": dataset.title, "loaders": found}, indent=2).encode())


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
            draws_B = plain.pick(places_B)
            draws_B.shift_N2[:] = torch.tensor([down, right])
            draws_B.mirror_N[:] = bool(mirror)
            same_B = (aug.apply(images_NHWC, places_B, draws_B, loader.dtype) == x_BCHW).flatten(1).all(1) & left_B
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
