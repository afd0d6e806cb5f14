"""What every loader must do, checked on each that is installed: the same batches, whoever makes them."""

import itertools
import os
import pickle
import signal

import numba
import numpy as np
import pytest
import torch

from fastcifar.data.digest import content_digest
from fastcifar.errors import UsageError
from fastcifar.loaders.augment import MEAN_C, STD_C
from fastcifar.loaders.torchvision import Drawn, outlive_sigterm
from fastcifar.resize import resize
from fastcifar.settings import Augment

EVERYTHING = Augment(
    crop_px=4, border="black", flip="random", rotate_deg=15.0, brightness=0.1, contrast=0.2, cutout_px=9
)


def all_of(loader, epoch: int = 0, first_batch: int = 0):
    """The batches as they were when each was handed out."""
    return [(x.clone(), y.clone()) for x, y in loader.epoch(epoch, first_batch)]


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def pixels(x_BCHW: torch.Tensor) -> np.ndarray:
    """Back to uint8 [B, H, W, 3]."""
    x_BHWC = x_BCHW.permute(0, 2, 3, 1).float() * torch.tensor(STD_C) + torch.tensor(MEAN_C)
    return (x_BHWC * 255).round().to(torch.uint8).numpy()


def test_without_shuffling_every_image_in_the_order_of_the_split(make, dataset):
    loader = make(shuffle=False)
    batches = all_of(loader)
    assert [len(y) for _, y in batches] == [10] * 10 + [3]
    assert len(batches) == len(loader)
    np.testing.assert_array_equal(pixels(torch.cat([x for x, _ in batches])), dataset.train.images_NHWC)
    np.testing.assert_array_equal(torch.cat([y for _, y in batches]), dataset.train.labels_N)


def test_the_images_of_an_epoch_have_the_digest_of_the_split(make, dataset):
    """23 images in batches of one: shuffled, and none left out."""
    batches = all_of(make("test", batch_size=1))
    images_NHWC, labels_N = pixels(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches]).numpy()
    assert content_digest(images_NHWC, labels_N.astype(np.uint8)) == dataset.digests["test"]
    assert not np.array_equal(images_NHWC, dataset.test.images_NHWC)


def test_shuffled_batches_are_full_and_share_no_image(make):
    batches = all_of(make())
    assert [len(y) for _, y in batches] == [10] * 10
    assert len(torch.cat([x for x, _ in batches]).flatten(1).unique(dim=0)) == 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_batches_are_what_the_step_wants(make, dtype):
    x_BCHW, y_B = next(iter(make(dtype=dtype).epoch(0)))
    assert x_BCHW.shape == (10, 3, 32, 32)
    assert x_BCHW.dtype == dtype
    assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert y_B.dtype == torch.int64


@pytest.mark.parametrize("image_px", [20, 48])
def test_images_of_another_size_are_the_same_images_resized(make, image_px):
    plain, other = make(augment=EVERYTHING), make(augment=EVERYTHING, image_px=image_px)
    resized = [(resize(x_BCHW, image_px), y_B) for x_BCHW, y_B in all_of(plain, first_batch=7)]
    assert resized[0][0].shape == (10, 3, image_px, image_px)
    assert same(resized, all_of(other, first_batch=7))
    some = torch.tensor([3, 50])
    torch.testing.assert_close(other.take(some), resize(plain.take(some), image_px), rtol=0, atol=0)


@pytest.mark.parametrize("augment", [Augment(), EVERYTHING], ids=["usual", "everything"])
def test_the_same_seed_gives_the_same_batches_with_any_number_of_workers(make, augment):
    loaders = [make(workers=workers, augment=augment, seed=7) for workers in (1, 2, 1, 2)]
    for epoch in (2, 0):
        first, *others = [all_of(loader, epoch) for loader in loaders]
        assert all(same(first, other) for other in others)
        assert not same(first, all_of(loaders[0], 5))
        assert not same(first, all_of(make(augment=augment, seed=8), epoch))


AUGMENTS = {
    "none": Augment(crop_px=0, flip="none"),
    "crop": Augment(crop_px=3, flip="none"),
    "crop onto black": Augment(crop_px=4, border="black", flip="none"),
    "flip": Augment(crop_px=0, flip="random"),
    "crop and alternating flip": Augment(),
    "colour": Augment(crop_px=0, flip="none", brightness=0.3, contrast=0.4),
    "cutout": Augment(crop_px=0, flip="none", cutout_px=11),
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_each_gives_the_batches_of_the_resident_one(make, feed, name):
    """Up to rounding in float32: each library divides by the deviation in its own way."""
    options = {"batch_size": 10, "shuffle": True, "seed": 3, "augment": AUGMENTS[name]}
    expected = all_of(feed("resident").loader("train", **options), 1)
    for (x_BCHW, y_B), (x, y) in zip(expected, all_of(make(**options), 1), strict=True):
        torch.testing.assert_close(x, x_BCHW, rtol=0, atol=2e-6)
        assert torch.equal(y, y_B)


REPAINTED = Augment(policy="randaugment", saturation=0.3, hue=0.2)


@pytest.mark.parametrize("augment", [REPAINTED, Augment(policy="autoaugment")], ids=["everything", "autoaugment"])
def test_new_bytes_are_the_same_to_the_bit_with_any_loader_and_number_of_workers(make, feed, augment):
    if make.kind == "dali":  # it has no such operations, and says so rather than leave them out
        with pytest.raises(UsageError, match=r"augment\.policy"):
            make(augment=augment)
        return
    options = {"batch_size": 20, "shuffle": True, "seed": 3, "augment": augment, "dtype": torch.bfloat16}
    expected = all_of(feed("resident", 1, options.pop("dtype")).loader("train", **options), 1)
    assert not same(expected, all_of(feed("resident", 1, torch.bfloat16).loader("train", **options), 2))
    for workers in (1, 2):
        assert same(expected, all_of(make(workers=workers, dtype=torch.bfloat16, **options), 1))


def test_each_rotates_as_the_resident_one(make, feed):
    """A pixel's centre may fall on the edge between two: which of them is nearest is then a matter of rounding."""
    options = {"batch_size": 100, "shuffle": True, "augment": Augment(rotate_deg=15.0)}
    ((expected, _),) = all_of(feed("resident").loader("train", **options))
    ((x_BCHW, _),) = all_of(make(**options))
    wrong_BHW = ((x_BCHW - expected).abs() > 1e-5).any(1)
    assert wrong_BHW.float().mean() < 1e-3
    assert not torch.allclose(x_BCHW, all_of(make(**options | {"augment": Augment()}))[0][0], atol=0.1)


@pytest.mark.parametrize("augment", [Augment(), EVERYTHING], ids=["usual", "everything"])
def test_an_epoch_can_be_taken_up_in_the_middle(make, augment):
    loader = make(augment=augment)
    whole = all_of(loader, 1)
    for _ in itertools.islice(loader.epoch(1), 2):
        pass
    assert same(whole[4:], all_of(loader, 1, first_batch=4))
    assert same(whole[9:], all_of(make(augment=augment), 1, first_batch=9))
    assert all_of(loader, 1, first_batch=10) == []


def test_batches_stay_as_they_are(make):
    """Libraries like to write the next batches over the last ones."""
    loader = make(batch_size=3, augment=Augment())
    assert same(list(loader.epoch(0)), all_of(loader))


def test_part_of_a_split(make, dataset):
    places_N = torch.tensor([5, 9, 70, 71, 102])
    loader = make(places_N=places_N, shuffle=False, batch_size=2)
    batches = all_of(loader)
    assert [len(y) for _, y in batches] == [2, 2, 1]
    np.testing.assert_array_equal(pixels(torch.cat([x for x, _ in batches])), dataset.train.images_NHWC[places_N])
    np.testing.assert_array_equal(loader.labels_N, dataset.train.labels_N[places_N])
    np.testing.assert_array_equal(pixels(loader.take(torch.tensor([3, 0]))), dataset.train.images_NHWC[[71, 5]])


def test_a_batch_size_can_change_between_epochs(make):
    loader = make(batch_size=40)
    assert [len(y) for _, y in loader.epoch(0)] == [40, 40]
    loader.batch_size = 25
    assert [len(y) for _, y in loader.epoch(0)] == [25] * 4
    loader.batch_size = 50
    assert [len(y) for _, y in loader.epoch(0)] == [50, 50]


def test_the_threads_of_torch_and_numba_are_left_alone(make):
    """FFCV sets both, when it is imported and in each epoch."""
    before = torch.get_num_threads(), numba.get_num_threads()
    loader = make(workers=1)
    for _ in loader.epoch(0):
        assert (torch.get_num_threads(), numba.get_num_threads()) == before
    assert (torch.get_num_threads(), numba.get_num_threads()) == before


def test_seeds_share_no_order(make):
    """FFCV's order is that of seed + epoch, so its seed 0 and seed 1 go the same ways one epoch apart."""
    orders = {tuple(make(seed=seed).order(epoch).tolist()) for seed in (0, 1) for epoch in range(20)}
    assert len(orders) == 40


def test_worker_processes_can_be_spawned(feed):
    """As on macOS, where they are not forked: all that a worker needs can be sent to it."""
    loader = feed("torch").loader("train", batch_size=10)
    again = pickle.loads(pickle.dumps(Drawn(loader.split, loader.draws(0, EVERYTHING))))
    assert again[3][0].shape == (3, 32, 32)


def test_worker_processes_leave_sigterm_to_the_training():
    before = signal.getsignal(signal.SIGTERM)
    try:
        outlive_sigterm(0)
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process
    finally:
        signal.signal(signal.SIGTERM, before)
