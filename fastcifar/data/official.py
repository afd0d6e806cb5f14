"""The official packaging: pickled batches, in a folder or still in the tar.gz they came in.

N images of a batch, stored as rows of 3072 bytes: the red plane, the green plane, the blue plane.
"""

import tarfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

from fastcifar.data.dataset import SPLITS, Progress, Raw, RawSplit
from fastcifar.data.known import Official
from fastcifar.data.safe_pickle import read_dict
from fastcifar.errors import DataError

ARCHIVE_ENDINGS = (".tar.gz", ".tgz", ".tar")
ROW_BYTES = 3 * 32 * 32


def read_folder(official: Official, folder: Path, progress: Progress | None = None) -> Raw:
    """Read the batches in `folder`. Raises DataError: one is missing or damaged."""
    present = {name: folder / name for name in official.files if (folder / name).is_file()}
    _refuse_missing(official, present, folder)
    return _parse(official, {name: path.read_bytes() for name, path in present.items()}, folder, progress)


def read_archive(official: Official, archive: Path, progress: Progress | None = None) -> Raw:
    """Read the batches out of `archive`, into memory: no member is ever written to disk under the name it asks for.

    Raises DataError: the archive is truncated or is none, a batch is missing or damaged.
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                ours = parts[-1:] and parts[-1] in official.files and parts[:-1] in ((), (official.folder,))
                if ours and member.isreg() and (file := tar.extractfile(member)):
                    contents[parts[-1]] = file.read()
                    if progress:
                        progress("unpacking batches", len(contents), len(official.files))
            while tar.fileobj and tar.fileobj.read(1 << 20):
                pass  # to the very end, where gzip compares its checksum: tarfile stops before
    except (tarfile.TarError, EOFError, zlib.error) as error:
        reason = str(error).split("\n")[0]  # tarfile lists every compression it has tried, a line each
        raise DataError(f"{archive} is truncated or damaged: {reason}.") from error
    except OSError as error:
        if error.errno is not None:  # the disk's fault, not the file's: gzip raises OSErrors without a number
            raise
        raise DataError(f"{archive} is truncated or damaged: {error}.") from error
    _refuse_missing(official, contents, archive)
    return _parse(official, contents, archive, progress)


def _refuse_missing(official: Official, present, source: Path) -> None:
    missing = [name for name in official.files if name not in present]
    if missing:
        raise DataError(
            f"{source} is not complete: {', '.join(missing)} missing. {official.title} is {len(official.files)} files: "
            f"{', '.join(official.files)}."
        )


def _parse(official: Official, contents: dict[str, bytes], source: Path, progress: Progress | None) -> Raw:
    class_names = _read_class_names(official, contents[official.meta], f"{source}: {official.meta}")
    splits = {}
    for split in SPLITS:
        images, labels, places = [], [], []
        for name in official.batches[split]:
            images_NHWC, labels_N = _read_batch(official, contents[name], f"{source}: {name}")
            images.append(images_NHWC)
            labels.append(labels_N)
            places += [(name, row) for row in range(len(labels_N))]
            if progress:
                progress(f"reading {split} batches", len(images), len(official.batches[split]))
        splits[split] = RawSplit(np.concatenate(images), np.concatenate(labels), _Places(places))
    return Raw(splits, class_names)


class _Places:
    def __init__(self, places: list[tuple[str, int]]):
        self.places = places

    def __call__(self, i: int) -> str:
        name, row = self.places[i]
        return f"image {row} of {name}"


def _read_class_names(official: Official, raw: bytes, where: str) -> tuple[str, ...]:
    names = read_dict(raw, where).get(official.class_names_key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where} holds no list of names under {official.class_names_key!r}.")
    if len(names) != len(official.class_names):
        raise DataError(f"{where} names {len(names)} classes, {official.title} has {len(official.class_names)}.")
    return tuple(names)


def _read_batch(official: Official, raw: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """One batch: images uint8 [N, 32, 32, 3], labels uint8 [N]."""
    batch = read_dict(raw, where)
    for key in ("data", official.labels_key):
        if key not in batch:
            raise DataError(f"{where} has no {key!r}; it has {', '.join(sorted(batch)) or 'nothing'}.")
    rows = batch["data"]
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8:
        found = rows.dtype if isinstance(rows, np.ndarray) else type(rows).__name__
        raise DataError(f"{where}: the images should be an array of uint8, are {found}.")
    if rows.ndim != 2 or rows.shape[1] != ROW_BYTES or len(rows) == 0:
        raise DataError(f"{where}: the images should be rows of {ROW_BYTES} bytes, the array has shape {rows.shape}.")
    labels_N = check_labels(official, batch[official.labels_key], where)
    if len(labels_N) != len(rows):
        raise DataError(f"{where} has {len(rows):,} images but {len(labels_N):,} labels.")
    images_NHWC = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images_NHWC, labels_N


def check_labels(official: Official, labels: object, where: str) -> np.ndarray:
    """The labels as uint8 [N]. Raises DataError: they are no whole numbers, or there is no such class."""
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu":
        labels = labels.tolist()
    whole = isinstance(labels, list) and all(type(label) is int and label.bit_length() < 32 for label in labels)
    if not whole:
        raise DataError(f"{where}: the labels should be a list of whole numbers.")
    labels_N = np.array(labels, dtype=np.int64)
    n_classes = len(official.class_names)
    wrong = np.flatnonzero((labels_N < 0) | (labels_N >= n_classes))
    if len(wrong):
        raise DataError(
            f"{where}: label {wrong[0]} is {labels_N[wrong[0]]}, {official.title} has classes 0 to {n_classes - 1}."
        )
    return labels_N.astype(np.uint8)
