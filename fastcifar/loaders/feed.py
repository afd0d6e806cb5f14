"""Loaders by name: what each needs, and `auto`, which measures.

feed = open_feed("ffcv", dataset, workers=2, device=device, dtype=torch.bfloat16)
loader = feed.loader("train", batch_size=500, shuffle=True, seed=0, augment=Augment())
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastcifar.data.dataset import Dataset, Progress
from fastcifar.data.pack import FORMATS, Pack, pack_for
from fastcifar.devices import synchronize
from fastcifar.errors import UsageError, UserError
from fastcifar.loaders.loader import Loader

# The fastest first, as measured (README).
LOADERS = ("resident", "ffcv", "dali", "torch")


@dataclass(frozen=True)
class Feed:
    """One kind of loader for one data set."""

    name: str
    dataset: Dataset
    workers: int
    device: torch.device
    dtype: torch.dtype
    pack: Pack | None  # the files that ffcv and dali read

    def loader(self, split: str, **options) -> Loader:
        """A loader of the split "train" or "test"; the options are those of `Loader`."""
        return import_loader(self.name)(
            getattr(self.dataset, split),
            workers=self.workers,
            device=self.device,
            dtype=self.dtype,
            **files(self.pack, split),
            **options,
        )


def open_feed(
    name: str,
    dataset: Dataset,
    *,
    workers: int,
    device: torch.device,
    dtype: torch.dtype,
    data: Path | None = None,
    progress: Progress | None = None,
) -> Feed:
    """The feed of this name; writes the files that ffcv or dali read where there are none yet.

    Args:
        data: where the user says the data set is: it may be such files.

    Raises DataError; UsageError: its library is not there.
    """
    import_loader(name)
    pack = pack_for(dataset, name, data, progress) if name in FORMATS else None
    return Feed(name, dataset, workers, device, dtype, pack)


def import_loader(name: str) -> type[Loader]:
    """Raises UsageError: the library beneath is not installed, or cannot be imported."""
    try:
        if name == "resident":
            from fastcifar.loaders.resident import ResidentLoader as Found
        elif name == "ffcv":
            from fastcifar.loaders.ffcv import FfcvLoader as Found
        elif name == "dali":
            from fastcifar.loaders.dali import DaliLoader as Found
        elif name == "torch":
            from fastcifar.loaders.torchvision import TorchLoader as Found
        else:
            raise UsageError(f"--loader: there is no {name!r}; there are {', '.join(LOADERS)}.", "--loader resident")
    except (ImportError, OSError) as error:
        hint = f"make loaders, or: pip install 'fastcifar[{name}]'" if name in FORMATS else "pip install torchvision"
        raise UsageError(f"--loader {name} cannot be used here: {error}.", hint) from error
    return Found


def files(pack: Pack | None, split: str) -> dict[str, Path]:
    """The files of a split, as arguments of the loader that reads them."""
    if pack is None:
        return {}
    if pack.format == "ffcv":
        return {"file": pack.file(f"{split}.beton")}
    return {"file": pack.file(f"{split}.tfrecord"), "index": pack.file(f"{split}.index")}


def pick_feed(
    needed_per_s: float, open_named: Callable[[str], Feed], train_loader: Callable[[Feed], Loader]
) -> tuple[Feed, Loader, str]:
    """(the first feed whose loader makes as many images a second as a step takes, or the fastest; that loader; why).

    What is not installed, has no room for its files, or cannot augment as asked, is passed over. The first that
    suffices is enough: a faster one would only wait.
    """
    tried = []
    for name in LOADERS:
        try:
            feed = open_named(name)
            loader = train_loader(feed)
        except UserError:
            continue
        tried.append((images_per_s(loader), feed, loader))
        if tried[-1][0] >= needed_per_s:
            break
    rate, feed, loader = max(tried, key=lambda found: found[0])
    return feed, loader, f"loader {feed.name}: {rate:,.0f} images/s, a step takes about {needed_per_s:,.0f}"


def images_per_s(loader: Loader, batches: int = 4) -> float:
    """Images a second over the first batches of an epoch, after as many to warm up."""
    seconds, images = math.inf, 0
    for epoch in range(2):
        made = itertools.islice(loader.epoch(epoch), batches)
        synchronize(loader.device)
        began_s, images = time.perf_counter(), sum(len(y_B) for _, y_B in made)
        synchronize(loader.device)
        seconds = time.perf_counter() - began_s
    return images / seconds
