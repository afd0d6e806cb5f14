"""A folder of PNGs, one folder per class: train/cat/anything.png, test/3/anything.png."""

from pathlib import Path

import numpy as np

from fastcifar.data.dataset import SPLITS, Progress, Raw, RawSplit
from fastcifar.data.known import Official
from fastcifar.data.png import decode_png
from fastcifar.errors import DataError


def is_png_tree(folder: Path) -> bool:
    """Has it a train/ or test/ with folders in it?"""
    return any(path.is_dir() for split in SPLITS for path in (folder / split).glob("*"))


def list_pngs(folder: Path, split: str) -> list[Path]:
    """Every file two levels below `split`, hidden ones left out (.DS_Store, .ipynb_checkpoints/cat.png)."""
    paths = sorted((folder / split).glob("*/*"))
    return [path for path in paths if path.name[0] != "." and path.parent.name[0] != "."]


def read_png_tree(official: Official, folder: Path, progress: Progress | None = None) -> Raw:
    """Read every PNG of the tree.

    Raises DataError: an unknown class folder, a file that is no 32 x 32 PNG, no file at all.
    """
    label_of = {name: label for label, name in enumerate(official.class_names)}
    label_of |= {str(label): label for label in label_of.values()}
    splits = {}
    for split in SPLITS:
        paths = list_pngs(folder, split)
        if not paths:
            raise DataError(f"{folder} has no {split} images: it needs train/CLASS/*.png and test/CLASS/*.png.")
        images_NHWC = np.empty((len(paths), 32, 32, 3), dtype=np.uint8)
        labels_N = np.empty(len(paths), dtype=np.uint8)
        for i, path in enumerate(paths):
            if path.parent.name not in label_of:
                raise DataError(
                    f"{path.parent} is the folder of no class of {official.title}. Its classes are "
                    f"{', '.join(official.class_names)}, or 0 to {len(official.class_names) - 1}."
                )
            images_NHWC[i] = decode_png(path.read_bytes(), str(path))
            labels_N[i] = label_of[path.parent.name]
            if progress and ((i + 1) % 1000 == 0 or i + 1 == len(paths)):
                progress(f"reading {split} PNGs", i + 1, len(paths))
        names = [path.relative_to(folder).as_posix() for path in paths]
        splits[split] = RawSplit(images_NHWC, labels_N, names.__getitem__)
    return Raw(splits, official.class_names)
