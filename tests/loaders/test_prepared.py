"""Copying from prepared images gives the same bits as making each anew."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar.loaders import augment as aug
from fastcifar.loaders.prepared import PreparedImages, can_prepare
from fastcifar.recipes import Augment

CPU = torch.device("cpu")
IMAGES_NHWC = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), np.uint8))
PREPARED = PreparedImages(IMAGES_NHWC)


def bits(x_BCHW: torch.Tensor) -> torch.Tensor:
    return x_BCHW.contiguous(memory_format=torch.channels_last).view(torch.int16)


@settings(max_examples=150, deadline=None)
@given(
    augment=st.builds(
        Augment,
        crop_px=st.integers(0, 4) | st.integers(0, 31),
        border=st.sampled_from(["reflect", "black"]),
        flip=st.sampled_from(["none", "random", "alternating"]),
        cutout_px=st.integers(0, 32),
    ),
    count=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_copying_equals_making_anew(augment, count, seed):
    assert can_prepare(augment, torch.bfloat16, CPU)
    draws = aug.draw(augment, len(IMAGES_NHWC), 32, seed, 1)
    places_B = torch.randperm(len(IMAGES_NHWC))[:count]
    copied_BCHW = PREPARED.batch(places_B, draws)
    assert copied_BCHW.is_contiguous(memory_format=torch.channels_last)
    anew_BCHW = aug.apply_torch(IMAGES_NHWC, places_B, draws, places_B, torch.bfloat16)
    assert torch.equal(bits(copied_BCHW), bits(anew_BCHW))


@pytest.mark.parametrize("change", [{"rotate_deg": 1.0}, {"brightness": 0.1}, {"contrast": 0.1}])
def test_what_changes_colours_or_angles_is_not_prepared(change):
    assert not can_prepare(Augment(**change), torch.bfloat16, CPU)


def test_only_bfloat16_on_a_cpu_is_prepared():
    assert not can_prepare(Augment(), torch.float32, CPU)
    assert not can_prepare(Augment(), torch.bfloat16, torch.device("cuda"))
