"""A small data set, and every loader that is installed, reading it."""

from collections.abc import Callable

import pytest
import torch

from fastcifar.data import shapes10
from fastcifar.data.dataset import Dataset
from fastcifar.data.pack import FORMATS, Pack, write_pack
from fastcifar.errors import UsageError
from fastcifar.loaders.feed import LOADERS, Feed, import_loader
from fastcifar.loaders.loader import Loader


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """103 training and 23 test images, all different."""
    return shapes10.generate(103, 23)


@pytest.fixture(scope="session")
def packs(dataset, tmp_path_factory) -> dict[str, Pack]:
    """What is read by the libraries that are installed."""
    packs = {}
    for name in FORMATS:
        try:
            import_loader(name)
            packs[name] = write_pack(dataset, name, tmp_path_factory.mktemp("packs") / name)
        except UsageError:
            continue
    return packs


@pytest.fixture(scope="session")
def feed(dataset, packs) -> Callable[..., Feed]:
    def feed(name: str, workers: int = 2, dtype: torch.dtype = torch.float32) -> Feed:
        try:
            import_loader(name)
        except UsageError as error:
            pytest.skip(str(error))
        return Feed(name, dataset, workers, torch.device("cpu"), dtype, packs.get(name))

    return feed


@pytest.fixture(params=LOADERS)
def make(request, feed) -> Callable[..., Loader]:
    """A loader of each kind: shuffled batches of ten training images, not augmented."""

    def make(split: str = "train", workers: int = 2, dtype: torch.dtype = torch.float32, **options) -> Loader:
        return feed(request.param, workers, dtype).loader(split, **{"batch_size": 10, "shuffle": True} | options)

    make.kind = request.param
    return make
