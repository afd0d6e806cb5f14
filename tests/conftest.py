"""A small data set in the official layout, and a cache folder that is thrown away."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from fastcifar.data import shapes10
from fastcifar.data.known import OFFICIAL


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    """No test reads or writes the cache of the person who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTCIFAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_cifar(tmp_path_factory) -> Path:
    """2,000 training and 500 test images of shapes in the folder and files of CIFAR-10: learnable in seconds."""
    official, parent = OFFICIAL["cifar10"], tmp_path_factory.mktemp("small")
    folder = parent / official.folder
    folder.mkdir()
    shapes = shapes10.generate(2000, 500)
    for split, names in official.batches.items():
        images_NHWC, labels_N = getattr(shapes, split).images_NHWC, getattr(shapes, split).labels_N
        for name, part in zip(names, np.array_split(np.arange(len(labels_N)), len(names)), strict=True):
            rows = images_NHWC[part].transpose(0, 3, 1, 2).reshape(len(part), -1)
            batch = {official.labels_key: labels_N[part].tolist(), "data": np.ascontiguousarray(rows)}
            (folder / name).write_bytes(pickle.dumps(batch))
    (folder / official.meta).write_bytes(pickle.dumps({official.class_names_key: list(official.class_names)}))
    return parent
