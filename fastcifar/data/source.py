"""Find a data set, read it, say whether it is really CIFAR: the way into this package.

    dataset = load("cifar10")                     # $FASTCIFAR_DATA, else the cache folder, else a download
    dataset = load("cifar10", Path("~/cifar"))    # any packaging of it that `_locate` knows

`load` reads a source once and keeps the arrays in a cache file; `verify` reads the source itself, each time.
"""

import contextlib
import hashlib
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcifar.data import shapes10
from fastcifar.data.cache import cache_file, cache_folder, read_cache, write_cache
from fastcifar.data.dataset import SPLITS, Dataset, Progress, Raw, Split, pixel_statistics
from fastcifar.data.digest import combine, first_difference, image_digests
from fastcifar.data.known import OFFICIAL, Official
from fastcifar.data.official import ARCHIVE_ENDINGS, read_archive, read_folder
from fastcifar.data.pack import find_pack, holds_pack_files, read_pack
from fastcifar.data.parquet import list_parquet_files, read_parquet
from fastcifar.data.png_tree import is_png_tree, list_pngs, read_png_tree
from fastcifar.errors import DataError, UsageError

DATASETS = (*OFFICIAL, "shapes10")


@dataclass(frozen=True)
class Finding:
    """What `verify` says of one split, or of the class names."""

    what: str  # "train", "test" or "class names"
    verified: bool
    text: str


@dataclass(frozen=True)
class Source:
    """A data set that was found but not yet read."""

    kind: str
    path: Path
    files: list[Path]
    read: Callable[[Official, Path, Progress | None], Raw]
    hint: str = ""  # the command to type when reading fails

    def fingerprint(self) -> str:
        """Another one as soon as a file of the source changes its size or time, moves, comes or goes."""
        stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files]
        return hashlib.sha256(repr((self.kind, os.path.realpath(self.path), stats)).encode()).hexdigest()


def load(dataset: str, path: Path | None = None, progress: Progress | None = None) -> Dataset:
    """The data set, mapped from its cache file; that is written first where there is none yet.

    If `path` is given it must hold the data set, else $FASTCIFAR_DATA must if that is set; else the cache folder is
    tried, then the network. shapes10 is generated.

    Raises DataMissing (nowhere, and no network), DataError (damaged, no room, not what was named) and UsageError (no
    such data set).
    """
    return _load(dataset, path, progress, reuse=True)


def prepare(dataset: str, path: Path | None = None, progress: Progress | None = None) -> Dataset:
    """As `load`, but read the source again even where the cache file is good."""
    return _load(dataset, path, progress, reuse=False)


def verify(dataset: str, path: Path | None = None, progress: Progress | None = None) -> list[Finding]:
    """Read the source itself, never the cache, and compare it with the official data set.

    A finding that is not verified names the first thing that differs: a count, an image, a label. For shapes10,
    "verified" means generated as on any other machine. Raises as `load` does.
    """
    official = _official(dataset, path)
    if official is None:
        made = shapes10.generate()
        return [
            Finding(s, made.digests[s] == known, f"generated from seed {shapes10.SEED}, SHA-256 {made.digests[s]}")
            for s, known in shapes10.DIGESTS.items()
        ]
    source = _find(official, path)
    with _explained(source.hint):
        raw = source.read(official, source.path, progress)
    return _compare(official, raw, _digest_images(raw, progress))


def describe(dataset: Dataset) -> list[tuple[str, str]]:
    """What to print about a data set, as (name, value)."""
    rows = [("data set", dataset.title), ("origin", dataset.origin), ("official", "yes" if dataset.verified else "no")]
    if dataset.warning:
        rows.append(("warning", dataset.warning))
    for name in SPLITS:
        split: Split = getattr(dataset, name)
        per_class = np.bincount(split.labels_N, minlength=len(dataset.class_names))
        low, high = per_class.min(), per_class.max()
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        rows += [(name, f"{len(split):,} images, {each} a class"), (f"{name} SHA-256", dataset.digests[name])]
    rows.append(("classes", f"{len(dataset.class_names)}: {', '.join(dataset.class_names)}"))
    for name, values in (("mean", dataset.mean_C), ("std", dataset.std_C)):
        rows.append((f"{name} (R, G, B)", ", ".join(f"{value:.4f}" for value in values)))
    rows.append(("cache file", str(dataset.cache_file or "none")))
    return rows


def _load(dataset: str, path: Path | None, progress: Progress | None, reuse: bool) -> Dataset:
    official = _official(dataset, path)
    if official is None:
        file, fingerprint = cache_file(dataset, "generated"), shapes10.DIGESTS["train"]
        make = shapes10.generate
    else:
        source = _find(official, path)
        with _explained(source.hint):
            file, fingerprint = cache_file(dataset, os.path.realpath(source.path)), source.fingerprint()

        def make() -> Dataset:
            with _explained(source.hint):
                raw = source.read(official, source.path, progress)
            return _build(official, source, raw, progress)

    if reuse and (cached := read_cache(file, fingerprint)):
        return cached
    made = make()
    write_cache(file, made, fingerprint)
    return read_cache(file, fingerprint) or made  # another process may have put a newer one in its place


def _official(dataset: str, path: Path | None) -> Official | None:
    if dataset not in DATASETS:
        raise UsageError(f"There is no data set {dataset!r}; there are {', '.join(DATASETS)}.")
    if dataset == "shapes10" and path is not None:
        raise UsageError(f"shapes10 is generated, it cannot be read from {path}: leave out --data.")
    return OFFICIAL.get(dataset)


# Finding


def _find(official: Official, path: Path | None) -> Source:
    """Where the data set is; after a download, in the cache folder. Raises DataError: nowhere."""
    command = f"fastcifar data prepare --dataset {official.name}"
    named = os.environ.get("FASTCIFAR_DATA")
    if path is not None:
        return _locate_or_explain(official, path.expanduser(), "--data", command)
    if named:
        return _locate_or_explain(
            official, Path(named).expanduser(), "$FASTCIFAR_DATA", f"env -u FASTCIFAR_DATA {command}"
        )

    folder = cache_folder()
    with _explained(f"{command} --data PATH"):
        source = _locate_official(official, folder)
        if source is None:
            from fastcifar.data.download import download

            source = _locate_official(official, download(official.url, official.archive_md5, folder))
    assert source is not None
    return _with_hint(source, f"rm -r {shlex.quote(str(source.path))} && {command}")


def _locate_or_explain(official: Official, path: Path, flag: str, command: str) -> Source:
    with _explained(command):
        if not path.exists():
            raise DataError(f"{flag} is {path}, and there is no such file or folder.")
        source = _locate(official, path)
        if source is not None:
            return _with_hint(source, command)
        others = [other.name for other in OFFICIAL.values() if _locate_official(other, path)]
        if holds_pack_files(path):
            others.append(find_pack(path).about["dataset"])
        if others:
            title, hint = others[0], f"fastcifar data prepare --dataset {shlex.quote(others[0])}"
            if title in OFFICIAL:  # shapes10 takes no --data
                title, hint = OFFICIAL[title].title, f"{hint} --data {shlex.quote(str(path))}"
            raise DataError(f"{flag} is {path}, which holds {title}, not {official.title}.", hint)
        raise DataError(
            f"{flag} is {path}, which holds no {official.title}. Looked for: {official.archive}; {official.folder} or "
            f"its files ({', '.join(official.files)}); PNGs as train/CLASS/*.png and test/CLASS/*.png; parquet files "
            "train*.parquet and test*.parquet; a pack of `fastcifar data write`."
        )


def _with_hint(source: Source, hint: str) -> Source:
    return Source(source.kind, source.path, source.files, source.read, hint)


def _locate(official: Official, path: Path) -> Source | None:
    """Any packaging of the data set that `path` is or holds."""
    if source := _locate_official(official, path):
        return source
    if is_png_tree(path):
        return Source("PNG tree", path, [file for s in SPLITS for file in list_pngs(path, s)], read_png_tree)
    if files := list_parquet_files(path):
        return Source("parquet files in", path, files, read_parquet)
    if holds_pack_files(path) and (pack := find_pack(path)).about["dataset"] == official.name:
        return Source(f"{pack.format.upper()} files in", path, pack.files, read_pack)
    return None


def _locate_official(official: Official, path: Path) -> Source | None:
    """The official archive or folder that `path` is or holds."""
    if path.is_file() and path.name.endswith(ARCHIVE_ENDINGS):
        return Source("official archive", path, [path], read_archive)
    inside = _locate_official(official, path / official.folder) if (path / official.folder).is_dir() else None
    files = [path / name for name in official.files if (path / name).is_file()]
    here = Source("official folder", path, files, read_folder) if files else inside
    archive = path / official.archive
    if archive.is_file() and (here is None or len(here.files) < len(official.files)):  # it was not wholly extracted
        return Source("official archive", archive, [archive], read_archive)
    return here


# Reading


def _build(official: Official, source: Source, raw: Raw, progress: Progress | None) -> Dataset:
    digests = _digest_images(raw, progress)
    splits = {}
    for s, split in raw.splits.items():
        order = sorted(range(len(digests[s])), key=digests[s].__getitem__)
        splits[s] = Split(split.images_NHWC[order], split.labels_N[order])
    wrong = [f"{finding.what}: {finding.text}" for finding in _compare(official, raw, digests) if not finding.verified]
    title = f"not {official.title}" if wrong else official.title
    mean_C, std_C = pixel_statistics(splits["train"].images_NHWC)
    return Dataset(
        name=official.name,
        title=title,
        **splits,
        class_names=raw.class_names,
        verified=not wrong,
        warning=f"{title}: {'; '.join(wrong)}" if wrong else "",
        digests={s: combine(digests[s]) for s in SPLITS},
        mean_C=mean_C,
        std_C=std_C,
        origin=f"{source.kind} {source.path}",
    )


def _digest_images(raw: Raw, progress: Progress | None) -> dict[str, list[bytes]]:
    return {s: image_digests(split.images_NHWC, split.labels_N, progress) for s, split in raw.splits.items()}


def _compare(official: Official, raw: Raw, digests: dict[str, list[bytes]]) -> list[Finding]:
    findings = []
    for s, split in raw.splits.items():
        difference = first_difference(official, s, split, digests[s])
        text = difference or f"{len(digests[s]):,} images, all of {official.title}, SHA-256 {official.digests[s]}"
        findings.append(Finding(s, not difference, text))
    for label, (name, right) in enumerate(zip(raw.class_names, official.class_names, strict=True)):
        if name != right:
            findings.append(Finding("class names", False, f"class {label} is called {name}, should be {right}"))
            break
    return findings


@contextlib.contextmanager
def _explained(hint: str):
    """Whatever goes wrong inside while reading becomes a DataError with a command to type next."""
    try:
        yield
    except DataError as error:
        if error.hint:
            raise
        raise type(error)(error.message, hint) from error
    except OSError as error:
        raise DataError(f"Cannot read {error.filename or 'the data'}: {error.strerror or error}.", hint) from error
