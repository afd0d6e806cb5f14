"""A data set written once in the format of a loading library: a folder with its files and about.json beside them.

about.json says whose files they are, what data set they hold and each file's size and SHA-256. It is written last, into
a folder that is renamed when it is whole: a pack is all there, or it is none.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcifar.data.beton import read_beton, write_beton
from fastcifar.data.cache import FULL, PREFIX, SUFFIX, cache_folder, storage_error, sweep
from fastcifar.data.dataset import SPLITS, Dataset, Progress, Raw, RawSplit, Split
from fastcifar.data.known import Official
from fastcifar.data.official import check_labels
from fastcifar.data.tfrecord import read_tfrecord, write_tfrecord
from fastcifar.errors import DataError, UsageError

VERSION = 1  # raise it whenever about.json or what the files hold changes
ABOUT = "about.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Format:
    """What a library calls its files, and the two functions that know what is in them."""

    library: str  # as pip knows it
    suffixes: tuple[str, ...]  # of the files of a split; the first is the one to read
    write: Callable[[Path, Split, Progress | None], None]
    read: Callable[[Path, Progress | None], tuple[np.ndarray, list[int]]]

    @property
    def files(self) -> list[str]:
        return [split + suffix for split in SPLITS for suffix in self.suffixes]


_FORMATS = {
    "ffcv": _Format("ffcv", (".beton",), write_beton, read_beton),
    "dali": _Format("tfrecord", (".tfrecord", ".index"), write_tfrecord, read_tfrecord),
}
FORMATS = ("ffcv", "dali")


@dataclass(frozen=True)
class Pack:
    """A folder that `open_pack` or `write_pack` has found good; `about` is what about.json says."""

    folder: Path
    format: str
    about: dict

    def file(self, name: str) -> Path:
        return self.folder / name

    @property
    def files(self) -> list[Path]:
        return [self.file(name) for name in (*_FORMATS[self.format].files, ABOUT)]


def describe_pack(pack: Pack) -> list[tuple[str, str]]:
    """What to print about a pack that was just written, as (name, value)."""
    about = pack.about
    rows = [("pack", str(pack.folder))]
    rows += [(name, f"{entry['bytes']:,} bytes") for name, entry in about["files"].items()]
    counts = " and ".join(f"{about['counts'][s]:,} {s}" for s in SPLITS)
    rows.append(("data set", f"{about['title']}, {counts} images"))
    if about["warning"]:
        rows.append(("warning", about["warning"]))
    return rows + [(f"{s} SHA-256", about["digests"][s]) for s in SPLITS]


def train_command(pack: Pack) -> str:
    """What to type to train on a pack."""
    name, folder = pack.about["dataset"], shlex.quote(str(pack.folder))
    command = f"fastcifar train --loader {pack.format}" + (f" --dataset {name}" if name != "cifar10" else "")
    if name != "shapes10":
        return f"{command} --data {folder}"
    # shapes10 takes no --data, it is generated; a pack in the cache folder is found there.
    return command if pack.folder.parent == cache_folder() else f"FASTCIFAR_DATA={folder} {command}"


# Finding and checking


def is_pack(path: Path) -> bool:
    """Is `path` a folder with an about.json of ours in it, whatever the state of the rest?"""
    try:
        about = json.loads((path / ABOUT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(about, dict) and "fastcifar_pack" in about


def holds_pack_files(path: Path) -> bool:
    """Is it a pack, or has it a file that is called as one of a pack's?"""
    return is_pack(path) or any((path / name).is_file() for each in _FORMATS.values() for name in each.files)


def open_pack(folder: Path) -> Pack:
    """The pack in `folder`, after a look at every byte of it. Raises DataError naming the file that is wrong."""
    pack = find_pack(folder)
    for name, entry in pack.about["files"].items():
        if _sha256(pack.file(name)) != entry["sha256"]:
            raise _damaged(pack, f"{pack.file(name)} is damaged: its SHA-256 is not the one that {ABOUT} recorded.")
    return pack


def find_pack(folder: Path) -> Pack:
    """As `open_pack`, but look no further than about.json and the sizes of the files."""
    pack = _read_about(folder)
    for name, entry in pack.about["files"].items():
        file = pack.file(name)
        if not file.is_file():
            raise _damaged(pack, f"The pack {folder} is not complete: {name} is missing.")
        if (size := file.stat().st_size) != entry["bytes"]:
            what = "is cut short" if size < entry["bytes"] else "is too long"
            raise _damaged(pack, f"{file} {what}: {size:,} of {entry['bytes']:,} bytes.")
    return pack


def _read_about(folder: Path) -> Pack:
    """The pack with its about.json found to be one. Raises DataError: it is missing or says something else."""
    file = folder / ABOUT
    there = [name for name, each in _FORMATS.items() if any((folder / part).is_file() for part in each.files)]
    hint = f"fastcifar data write --format {there[0] if there else FORMATS[0]} --dataset NAME"
    try:
        about = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"The pack {folder} is not complete: {ABOUT} is missing.", hint) from error
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error.strerror or error}.", hint) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged: it is not JSON ({error}).", hint) from error
    version = about.get("fastcifar_pack") if isinstance(about, dict) else None
    if version is None:
        raise DataError(f"{file} is not the {ABOUT} of a pack: it has no 'fastcifar_pack'.", hint)
    if version != VERSION or type(version) is not int:
        raise DataError(
            f"The pack {folder} was written in version {version!r} of the format, this fastcifar reads version "
            f"{VERSION}.",
            hint,
        )
    if not _is_sound(about):
        raise DataError(f"{file} is damaged: it does not say all that the {ABOUT} of a pack says.", hint)
    return Pack(folder, about["format"], about)


def _is_sound(about: dict) -> bool:
    """Has about.json every entry that this file reads, each of its type?"""
    try:
        names = _FORMATS[about["format"]].files
        texts = [about[key] for key in ("library", "library_version", "dataset", "title", "warning", "origin")]
        texts += [about[key][split] for key in ("digests", "ordered") for split in SPLITS]
        texts += [about["files"][name]["sha256"] for name in names]
        whole = [about["counts"][split] for split in SPLITS] + [about["files"][name]["bytes"] for name in names]
        texts += about["class_names"] if isinstance(about["class_names"], list) else [None]
        types = {*map(type, texts)} == {str} and {*map(type, whole)} == {int} and type(about["verified"]) is bool
        return types and list(about["files"]) == names
    except (LookupError, TypeError):
        return False


def _damaged(pack: Pack, message: str) -> DataError:
    name, folder = shlex.quote(pack.about["dataset"]), shlex.quote(str(pack.folder))
    named = os.environ.get("FASTCIFAR_DATA")
    apart = "env -u FASTCIFAR_DATA " if named and Path(named).expanduser().absolute() == pack.folder.absolute() else ""
    return DataError(message, f"{apart}fastcifar data write --format {pack.format} --dataset {name} --out {folder}")


def pack_for(dataset: Dataset, format: str, data: Path | None, progress: Progress | None = None) -> Pack:
    """The pack of this very data set that a loader is to read: `data` or $FASTCIFAR_DATA if that is one, else the one
    in the cache folder, which is written if it is missing or damaged.

    Raises DataError: the pack that was named is damaged or of other images; there is no room for a new one.
    """
    named = data or os.environ.get("FASTCIFAR_DATA")
    if named and is_pack(folder := Path(named).expanduser()):
        pack = _read_about(folder)
        # Data set and environment may disagree on shapes10, which is never read from there.
        if pack.format == format and (data is not None or pack.about["dataset"] == dataset.name):
            pack = open_pack(folder)
            if reason := _mismatch(pack, dataset):
                hint = f"fastcifar data write --format {format} --dataset {dataset.name}"
                raise DataError(f"The pack {folder} does not hold the images to train on: {reason}.", hint)
            return pack

    folder = _default_folder(dataset, format)
    if folder.exists():
        try:
            pack = open_pack(folder)
            reason = _mismatch(pack, dataset)
        except DataError as error:
            pack, reason = None, error.message.rstrip(".")
        if pack and not reason:
            return pack
        log.warning("the pack in the cache folder cannot be used (%s); writing it again", reason)
    return write_pack(dataset, format, progress=progress)


def _mismatch(pack: Pack, dataset: Dataset) -> str:
    """Why a pack holds other images than `dataset`, or holds them in another order; empty if it does not."""
    for split in SPLITS:
        if pack.about["digests"][split] != dataset.digests[split]:
            return f"its {split} images are not those of {dataset.title} from {dataset.origin}"
        if pack.about["ordered"][split] != _ordered_digest(getattr(dataset, split)):
            return f"its {split} images are in another order than those of {dataset.title} from {dataset.origin}"
    return ""


def read_pack(official: Official, path: Path, progress: Progress | None = None) -> Raw:
    """Check the whole pack, then read its images. Raises DataError: it is damaged, or no pack of such a data set."""
    pack = open_pack(path)
    names = pack.about["class_names"]
    if len(names) != len(official.class_names):
        raise DataError(f"{path} names {len(names)} classes, {official.title} has {len(official.class_names)}.")
    splits = {}
    for split in SPLITS:
        kind = _FORMATS[pack.format]
        file = pack.file(split + kind.suffixes[0])
        images_NHWC, labels = kind.read(file, progress)
        labels_N = check_labels(official, labels, str(file))
        splits[split] = RawSplit(images_NHWC, labels_N, f"image {{}} of {file.name}".format)
    return Raw(splits, tuple(names))


# Writing


def write_pack(dataset: Dataset, format: str, folder: Path | None = None, progress: Progress | None = None) -> Pack:
    """Write `dataset`, in its order, into `folder`, else into the cache folder: whole or not at all.

    A pack that is there already is replaced. Raises UsageError: the library is not installed, `folder` holds something
    else. DataError: no room, no permission.
    """
    if format not in FORMATS:
        raise UsageError(f"There is no pack format {format!r}; there are {', '.join(FORMATS)}.")
    target = _default_folder(dataset, format) if folder is None else folder.expanduser().resolve()
    try:
        if folder is not None:
            _refuse_foreign(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        _refuse_if_full(dataset, target.parent)
        unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=PREFIX, suffix=SUFFIX))
        try:
            about = _write_files(dataset, format, unfinished, progress)
            unfinished.chmod(0o755)  # made for nobody but its owner, and a pack is there to be shared
            _put_in_place(unfinished, target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise _storage_error(error, dataset, format, target, folder is None) from error
    return Pack(target, format, about)


def _default_folder(dataset: Dataset, format: str) -> Path:
    """The pack's place in the cache folder: another one for other images."""
    digest = hashlib.sha256("".join(dataset.digests[split] for split in SPLITS).encode()).hexdigest()
    return cache_folder() / f"{dataset.name}-{format}-{digest[:12]}"


def _refuse_foreign(folder: Path) -> None:
    """Raises UsageError: `folder` is there, and it is not a pack or not only that. It would be lost."""
    while True:
        try:
            before = folder.stat()
            if not folder.is_dir():
                raise UsageError(f"--out is {folder}, which is a file; a pack is a folder.")
            ours = {ABOUT, *(name for each in _FORMATS.values() for name in each.files)} if is_pack(folder) else set()
            others = sorted(set(os.listdir(folder)) - ours)
            after = folder.stat()
        except FileNotFoundError:
            return
        if not others:
            return
        # Another writer may put its pack in the place of the one that is being looked at.
        if (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns):
            raise UsageError(f"--out is {folder}, which holds {others[0]}, no part of a pack. Name a new folder.")


def _bytes_needed(dataset: Dataset) -> int:
    """A little more than either format takes: FFCV fills up pages of 8 MB, two in a file."""
    return sum(len(getattr(dataset, split)) for split in SPLITS) * 3200 + 40_000_000


def _refuse_if_full(dataset: Dataset, folder: Path) -> None:
    if shutil.disk_usage(folder).free < _bytes_needed(dataset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _storage_error(error: OSError, dataset: Dataset, format: str, target: Path, in_cache: bool) -> DataError:
    """What to tell a person whose pack cannot be written."""
    if in_cache:
        return storage_error(error, target.parent)
    hint = f"fastcifar data write --format {format} --dataset {dataset.name} --out /folder/with/room"
    if error.errno in FULL:
        return DataError(
            f"There is no room left in {target.parent} ({error.strerror}): this pack needs "
            f"{_bytes_needed(dataset) / 1e6:.0f} MB there. Nothing half-written was left.",
            hint,
        )
    return DataError(f"Cannot write to {target.parent}: {error.strerror or error}.", hint)


def _write_files(dataset: Dataset, format: str, folder: Path, progress: Progress | None) -> dict:
    """Write the files and then about.json, and return what it says. Raises DataError: they do not read back."""
    kind = _FORMATS[format]
    ordered = {split: _ordered_digest(getattr(dataset, split)) for split in SPLITS}
    for split in SPLITS:
        file = folder / (split + kind.suffixes[0])
        kind.write(file, getattr(dataset, split), progress)
        # A full disk may take a part of what FFCV writes and report no error.
        try:
            images_NHWC, labels = kind.read(file, None)
        except DataError as error:
            raise DataError(f"{file} cannot be read back: is the disk full or damaged?") from error
        if _ordered_digest(Split(images_NHWC, np.array(labels, np.uint8))) != ordered[split]:
            raise DataError(f"{file} does not read back as it was written: is the disk full or damaged?")
    files = {}
    for name in kind.files:
        _flush(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    about = {
        "fastcifar_pack": VERSION,
        "format": format,
        "library": kind.library,
        "library_version": importlib.metadata.version(kind.library),
        "dataset": dataset.name,
        "title": dataset.title,
        "verified": dataset.verified,
        "warning": dataset.warning,
        "class_names": list(dataset.class_names),
        "digests": dataset.digests,
        "ordered": ordered,
        "counts": {split: len(getattr(dataset, split)) for split in SPLITS},
        "origin": dataset.origin,
        "files": files,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    _flush(folder / ABOUT)
    return about


def _put_in_place(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`. No folder can be renamed onto one that holds something: that one goes first."""
    while True:
        try:
            return os.rename(made, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        aside = tempfile.mkdtemp(dir=folder.parent, prefix=PREFIX, suffix=SUFFIX)
        with contextlib.suppress(FileNotFoundError):  # another writer was quicker
            os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _flush(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _ordered_digest(split: Split) -> str:
    """SHA-256 of all labels and then all pixels, in this order: `Dataset.digests` are the same for any order."""
    digest = hashlib.sha256(np.ascontiguousarray(split.labels_N).data)
    digest.update(np.ascontiguousarray(split.images_NHWC).data)
    return digest.hexdigest()
