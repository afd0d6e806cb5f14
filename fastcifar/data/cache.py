"""A parsed data set in one memory-mappable file: the second `load` takes 0.13 s, nearly all of it the checksum.

The file is a safetensors file: the four arrays, and in its metadata `about` (JSON: everything else of the Dataset) and
`sha256` (of `about` and the arrays). It is only a cache: if anything is wrong with it, the source is read again.
"""

import contextlib
import errno
import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import platformdirs

from fastcifar.data.dataset import SPLITS, Dataset, Split
from fastcifar.errors import DataError

FORMAT = 1  # raise it whenever `about`, the arrays or their order change

# No room left: on the disk, in the user's quota, under the process's limit on file sizes.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What a file or folder is called, for tempfile, until it is whole and renamed.
PREFIX, SUFFIX = "fastcifar-", ".part"

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$FASTCIFAR_CACHE, else the user's cache folder."""
    return Path(os.environ.get("FASTCIFAR_CACHE") or platformdirs.user_cache_dir("fastcifar")).expanduser()


def cache_file(dataset: str, source: str) -> Path:
    """Where the parsed form of a source is kept; a changed source overwrites its own file."""
    return cache_folder() / f"{dataset}-{hashlib.sha256(source.encode()).hexdigest()[:12]}.safetensors"


def write_cache(file: Path, dataset: Dataset, fingerprint: str) -> None:
    """Write `dataset` to `file`: whole or not at all, whoever else does the same.

    Raises DataError: the disk is full, the folder cannot be written to.
    """
    about = {field.name: getattr(dataset, field.name) for field in fields(Dataset) if field.name not in _NOT_ABOUT}
    about |= {"format": FORMAT, "fingerprint": fingerprint, "counts": {s: len(getattr(dataset, s)) for s in SPLITS}}
    splits: list[Split] = [getattr(dataset, s) for s in SPLITS]
    arrays = [np.ascontiguousarray(a).data for split in splits for a in (split.images_NHWC, split.labels_N)]
    text = json.dumps(about)
    checksum = hashlib.sha256(text.encode())
    for array in arrays:
        checksum.update(array)
    header = json.dumps({"__metadata__": {"about": text, "sha256": checksum.hexdigest()}, **_layout(about["counts"])})
    header = header.encode()
    header += b" " * (-len(header) % 8)

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sweep(file.parent)
        handle, unfinished = tempfile.mkstemp(dir=file.parent, prefix=PREFIX, suffix=SUFFIX)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(len(header).to_bytes(8, "little") + header)
                for array in arrays:
                    out.write(array)
                out.flush()
                os.fsync(out.fileno())
            os.chmod(unfinished, 0o644)  # a cache folder may be shared
            os.replace(unfinished, file)
        except BaseException:
            os.unlink(unfinished)
            raise
    except OSError as error:
        raise storage_error(error, file.parent) from error


def read_cache(file: Path, fingerprint: str) -> Dataset | None:
    """The data set that `file` keeps, its arrays mapped and read-only; None if it must be written (again)."""
    try:
        with open(file, "rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        n_header = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + n_header])
        metadata = header.pop("__metadata__")
        about = json.loads(metadata["about"])
        if about["format"] != FORMAT or about["fingerprint"] != fingerprint:
            return None
        payload = memoryview(mapped)[8 + n_header :]
        checksum = hashlib.sha256(metadata["about"].encode())
        checksum.update(payload)
        if header != _layout(about["counts"]) or checksum.hexdigest() != metadata["sha256"]:
            raise ValueError("its checksum is wrong")
        arrays = {
            name: np.frombuffer(payload[slice(*entry["data_offsets"])], np.uint8).reshape(entry["shape"])
            for name, entry in header.items()
        }
        splits = {s: Split(arrays[f"{s}.images"], arrays[f"{s}.labels"]) for s in SPLITS}
        for tuple_field in ("class_names", "mean_C", "std_C"):
            about[tuple_field] = tuple(about[tuple_field])
        kept = {field.name: about[field.name] for field in fields(Dataset) if field.name not in _NOT_ABOUT}
        return Dataset(**splits, **kept, cache_file=file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        log.warning("the cache file %s is damaged (%s); writing it again from the source", file, error)
        return None


_NOT_ABOUT = (*SPLITS, "cache_file")


def _layout(counts: dict[str, int]) -> dict:
    """Where each array lies, as a safetensors header says it: the one layout that is written, and read back."""
    layout, start = {}, 0
    for split in SPLITS:
        for name, shape in (("images", [counts[split], 32, 32, 3]), ("labels", [counts[split]])):
            end = start + int(np.prod(shape))
            layout[f"{split}.{name}"] = {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}
            start = end
    return layout


def sweep(folder: Path) -> None:
    """Remove what processes killed while writing have left, 184 MB each; a day is longer than any of them writes."""
    for part in folder.glob(f"{PREFIX}*{SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > 24 * 3600:
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def storage_error(error: OSError, folder: Path) -> DataError:
    """What to tell a person whose cache folder cannot be written to."""
    hint = "export FASTCIFAR_CACHE=/folder/with/room"
    if error.errno in FULL:
        return DataError(
            f"There is no room left in {folder} ({error.strerror}): a data set needs 200 MB there, its archive as much "
            "again. Nothing half-written was left. Make room, or set FASTCIFAR_CACHE to a folder on another disk.",
            hint,
        )
    return DataError(
        f"Cannot write to the cache folder {folder}: {error.strerror or error}. Set FASTCIFAR_CACHE to another folder.",
        hint,
    )
