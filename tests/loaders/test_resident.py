"""The loader contract: what every loader must do, checked on the resident one."""

import numpy as np
import pytest
import torch

from fastcifar.data.dataset import Split
from fastcifar.loaders.resident import ResidentLoader
from fastcifar.recipes import Augment

CPU = torch.device("cpu")


@pytest.fixture
def split() -> Split:
    """103 images, each recognised by its first pixel: image n is all n."""
    images = np.repeat(np.arange(103, dtype=np.uint8), 32 * 32 * 3).reshape(103, 32, 32, 3)
    return Split(images, (np.arange(103) % 10).astype(np.uint8))


def make(split: Split, **options) -> ResidentLoader:
    options = {"batch_size": 10, "dtype": torch.float32, "device": CPU, "shuffle": True, "augment": Augment()} | options
    return ResidentLoader(split, **options)


def all_of(loader: ResidentLoader, epoch: int = 0, first_batch: int = 0):
    return [(x.clone(), y.clone()) for x, y in loader.epoch(epoch, first_batch)]


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def test_every_image_once_without_shuffling(split):
    loader = make(split, shuffle=False, augment=Augment(crop_px=0, flip="none"))
    batches = all_of(loader)
    assert [len(y) for _, y in batches] == [10] * 10 + [3]
    assert len(batches) == len(loader)
    assert torch.equal(torch.cat([y for _, y in batches]), torch.arange(103) % 10)
    assert len(torch.cat([x[:, 0, 0, 0] for x, _ in batches]).unique()) == 103


def test_every_image_at_most_once_with_shuffling(split):
    loader = make(split)
    batches = all_of(loader)
    assert [len(y) for _, y in batches] == [10] * 10 == [10] * len(loader)
    assert len(torch.cat([x[:, 0, 0, 0] for x, _ in batches]).unique()) == 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batches_are_what_the_step_wants(split, dtype):
    x_BCHW, y_B = next(iter(make(split, dtype=dtype).epoch(0)))
    assert x_BCHW.shape == (10, 3, 32, 32)
    assert x_BCHW.dtype == dtype
    assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert y_B.dtype == torch.int64


def test_the_same_seed_and_epoch_give_the_same_batches(split):
    augment = Augment(crop_px=3, flip="random", cutout_px=6, brightness=0.1, contrast=0.1)
    one, other = make(split, augment=augment), make(split, augment=augment)
    all_of(other, epoch=5)  # what was asked before must not matter
    assert same(all_of(one, 2), all_of(other, 2))
    assert not same(all_of(one, 2), all_of(one, 3))
    assert not same(all_of(one, 2), all_of(make(split, augment=augment, seed=1), 2))


def test_seed_and_epoch_do_not_add_up(split):
    """FFCV's order is that of seed + epoch; ours is not."""
    assert not torch.equal(make(split, seed=0).order(1), make(split, seed=1).order(0))


def test_an_epoch_can_start_in_the_middle(split):
    augment = Augment(crop_px=3, flip="random", brightness=0.1)
    assert same(all_of(make(split, augment=augment), 1)[4:], all_of(make(split, augment=augment), 1, first_batch=4))


def test_labels_belong_to_their_images(split):
    loader = make(split, augment=Augment(crop_px=0, flip="none"))
    pixel_of = {float(x[0, 0, 0]): n for n, x in enumerate(loader.take(torch.arange(103)))}
    for x_BCHW, y_B in loader.epoch(0):
        assert [pixel_of[float(x[0, 0, 0])] % 10 for x in x_BCHW] == y_B.tolist()


def test_numba_threads_do_not_change_the_result(split):
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(1)
    one = all_of(make(split))
    numba.set_num_threads(before)
    assert same(one, all_of(make(split)))
