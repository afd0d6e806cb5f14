"""What only FFCV's loader can get wrong: its thread and its buffers."""

import threading

import pytest
import torch

from fastcifar.loaders import augment
from fastcifar.settings import Augment


@pytest.fixture
def loader(feed):
    return feed("ffcv").loader("train", batch_size=10, shuffle=True)


def test_an_error_in_its_thread_is_raised_where_batches_are_read(loader, monkeypatch):
    """FFCV's own thread would die, and its reader wait forever."""

    def fail(*_):
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr("fastcifar.loaders.augment.apply", fail)
    with pytest.raises(ZeroDivisionError, match="broken on purpose"):
        next(loader.epoch(0))
    monkeypatch.undo()
    assert sum(len(y_B) for _, y_B in loader.epoch(0)) == 100


def test_one_epoch_at_a_time(loader):
    first = loader.epoch(0)
    next(first)
    with pytest.raises(RuntimeError, match="one set of buffers"):
        next(loader.epoch(1))
    first.close()
    next(loader.epoch(1))


@pytest.mark.parametrize("read", [0, 1, 8])
def test_an_epoch_that_is_left_leaves_no_thread(loader, read):
    before = threading.active_count()
    batches = loader.epoch(0)
    for _ in range(read):
        next(batches)
    batches.close()
    assert threading.active_count() == before


def test_our_loop_compiles_after_ffcv_was_used(loader):
    """FFCV marks numba's type of byte rows as read-only, for the whole process."""
    next(loader.epoch(0))
    augment._augment.recompile()
    assert sum(len(y_B) for _, y_B in loader.epoch(0)) == 100


def test_bytes_that_are_augmented_where_they_are_copied_to(feed, monkeypatch):
    """The pipeline for a GPU, with the CPU in its place: copied as bytes, augmented outside of FFCV."""
    feeds = [feed(name) for name in ("ffcv", "resident")]  # or skip: what is patched cannot be imported without FFCV
    monkeypatch.setattr("fastcifar.loaders.ffcv.is_gpu", lambda device: True)
    options = {"batch_size": 40, "shuffle": True, "augment": Augment(crop_px=3, flip="random", cutout_px=5)}
    there, resident = (feed.loader("train", **options) for feed in feeds)
    assert there.ships_bytes
    batches = list(there.epoch(2))
    for (x_BCHW, y_B), (expected_BCHW, expected_B) in zip(batches, resident.epoch(2), strict=True):
        assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x_BCHW, expected_BCHW)
        assert torch.equal(y_B, expected_B)
