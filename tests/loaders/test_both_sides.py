"""Reading from both sides of the images gives the same bits as turning them round each time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.loaders import augment as aug
from fastcifar.loaders.both_sides import PIECE_IMAGES, BothSides
from fastcifar.settings import Augment

IMAGES_NHWC = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), np.uint8))


@settings(max_examples=150, deadline=None)
@given(
    augment=st.builds(
        Augment,
        crop_px=st.integers(0, 4) | st.integers(0, 15),
        border=st.sampled_from(["reflect", "black"]),
        flip=st.sampled_from(["none", "random", "alternating"]),
        brightness=st.just(0.0) | st.floats(0, 1),
        contrast=st.just(0.0) | st.floats(0, 0.99),
        cutout_px=st.integers(0, 32),
    ),
    count=st.integers(1, 60) | st.just(PIECE_IMAGES) | st.just(PIECE_IMAGES + 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_both_sides_equal_one(augment, count, dtype, seed):
    draws = aug.draw(augment, len(IMAGES_NHWC), 32, seed, 1)
    places_B = torch.randperm(len(IMAGES_NHWC))[:count]
    x_BCHW = BothSides(IMAGES_NHWC.numpy(), augment).batch(places_B, draws, dtype)
    assert x_BCHW.dtype == dtype
    assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x_BCHW, aug.apply_torch(IMAGES_NHWC, places_B, draws, places_B, dtype))


@pytest.mark.parametrize(
    ("augment", "suits"),
    [(Augment(crop_px=15), True), (Augment(crop_px=16), False), (Augment(rotate_deg=1.0), False)],
    ids=["near", "far", "turned"],
)
def test_what_it_cannot_do_it_does_not_take(augment, suits):
    assert BothSides.suits(augment, 32) is suits
