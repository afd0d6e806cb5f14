"""Hugging Face's packaging: parquet files of PNGs and labels.

train-00000-of-00001.parquet or train/0000.parquet, the same for test, at any of a few depths below the folder given;
columns img or image (a struct with the PNG under `bytes`), and label (CIFAR-10) or fine_label (CIFAR-100).
"""

from pathlib import Path

import numpy as np

from fastcifar.data.dataset import SPLITS, Progress, Raw, RawSplit
from fastcifar.data.known import CIFAR10, Official
from fastcifar.data.official import check_labels
from fastcifar.data.png import decode_png
from fastcifar.errors import DataError

# A snapshot of the hub lies three folders deep; a limit keeps `--data ~` from searching a whole home.
_DEPTHS = ("*.parquet", "*/*.parquet", "*/*/*.parquet", "*/*/*/*.parquet")


def list_parquet_files(folder: Path) -> list[Path]:
    """The parquet files in `folder` and up to three levels below that belong to a split."""
    return sorted(path for depth in _DEPTHS for path in folder.glob(depth) if _split_of(path))


def _split_of(path: Path) -> str:
    return next((split for split in SPLITS if path.name.startswith(split) or path.parent.name == split), "")


def read_parquet(official: Official, folder: Path, progress: Progress | None = None) -> Raw:
    """Read the parquet files below `folder` that have the columns of this data set.

    Raises DataError: pyarrow is not installed, a file is damaged, no file has the columns, an image or label is wrong.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"{folder} holds parquet files, and reading those needs pyarrow.",
            "make dev, or: pip install 'fastcifar[parquet]'",
        ) from error

    label_column = "label" if official is CIFAR10 else "fine_label"
    images: dict[str, list] = {split: [] for split in SPLITS}
    labels: dict[str, list] = {split: [] for split in SPLITS}
    places: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in list_parquet_files(folder):
        split, name = _split_of(path), path.relative_to(folder).as_posix()
        try:
            with pq.ParquetFile(path) as file:
                columns = file.schema_arrow.names
                image_column = next((column for column in ("img", "image") if column in columns), None)
                if label_column not in columns or image_column is None:
                    continue  # the other data set, in the same folder
                table = file.read(columns=[image_column, label_column])
            cells, file_labels = table[image_column].to_pylist(), table[label_column].to_pylist()
        except Exception as error:  # pyarrow's own errors, and OSError and ValueError besides
            raise DataError(f"{path} is truncated or no parquet file: {error}.") from error
        labels[split].append(check_labels(official, file_labels, str(path)))
        for row, cell in enumerate(cells):
            place = f"row {row} of {name}"
            content = cell.get("bytes") if isinstance(cell, dict) else None
            if not isinstance(content, bytes):
                raise DataError(f"{folder}: {place} holds no PNG under {image_column}.bytes.")
            images[split].append(decode_png(content, f"{folder}: {place}"))
            places[split].append(place)
            if progress and ((row + 1) % 1000 == 0 or row + 1 == len(cells)):
                progress(f"reading {name}", row + 1, len(cells))
    for split in SPLITS:
        if not images[split]:
            raise DataError(
                f"{folder} holds no {split} images of {official.title}: no parquet file of that split "
                f"has a column img or image beside a column {label_column}."
            )
    return Raw(
        {s: RawSplit(np.stack(images[s]), np.concatenate(labels[s]), places[s].__getitem__) for s in SPLITS},
        official.class_names,
    )
