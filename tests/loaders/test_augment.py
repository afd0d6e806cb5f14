"""The two ways to augment agree bit for bit, and both do what their names say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastcifar.loaders import augment as aug
from fastcifar.recipes import Augment

IMAGES_NHWC = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))
EVERYTHING = Augment(crop_px=4, flip="random", cutout_px=9, brightness=0.2, contrast=0.3)


def apply_both(augment: Augment, dtype: torch.dtype, seed: int = 0, images_NHWC=IMAGES_NHWC):
    draws = aug.draw(augment, len(images_NHWC), images_NHWC.size(1), seed, 0, "cpu")
    ids_B = torch.randperm(len(images_NHWC))[:30]
    table = aug.value_table(aug.normalised_values("cpu"), draws.scale_N[ids_B], draws.offset_N[ids_B], dtype)
    return draws, ids_B, [apply(images_NHWC, ids_B, draws, table) for apply in (aug.apply_torch, aug.apply_numba)]


@settings(max_examples=40, deadline=None)
@given(
    crop_px=st.integers(0, 8),
    flip=st.sampled_from(["none", "random", "alternating"]),
    cutout_px=st.integers(0, 32),
    brightness=st.floats(0, 1),
    contrast=st.floats(0, 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_numba_equals_torch(crop_px, flip, cutout_px, brightness, contrast, dtype, seed):
    _, _, (plain, fast) = apply_both(Augment(crop_px, flip, cutout_px, brightness, contrast), dtype, seed)
    assert fast.dtype == dtype
    assert torch.equal(plain, fast)
    assert fast.is_contiguous(memory_format=torch.channels_last)


def test_torch_equals_one_image_at_a_time():
    """Pad, crop, mirror, jitter, cut out: written down the way a textbook would."""
    draws, ids_B, (plain, _) = apply_both(EVERYTHING, torch.float32)
    for x_CHW, n in zip(plain, ids_B, strict=True):
        image = IMAGES_NHWC[n].permute(2, 0, 1).float() / 255
        image = (image - torch.tensor(aug.MEAN_C)[:, None, None]) / torch.tensor(aug.STD_C)[:, None, None]
        image = image * draws.scale_N[n] + draws.offset_N[n]
        row, column = (draws.shift_N2[n] + 4).tolist()
        padded = F.pad(image[None], (4,) * 4, "reflect")[0]
        # Mirrored first, then shifted: the shift of a mirrored image moves the other way.
        image = padded.flip(2) if draws.mirror_N[n] else padded
        image = image[:, row : row + 32, (8 - column if draws.mirror_N[n] else column) :][:, :, :32]
        top, left = draws.cutout_N2[n].tolist()
        image = image.clone()
        image[:, max(0, top) : max(0, top + 9), max(0, left) : max(0, left + 9)] = 0
        torch.testing.assert_close(x_CHW, image, rtol=0, atol=1e-6)


def test_compiled_equals_eager():
    """CUDA runs the compiled form; Inductor compiles it for the CPU as well."""
    draws, ids_B, (plain, _) = apply_both(EVERYTHING, torch.bfloat16)
    table = aug.value_table(aug.normalised_values("cpu"), draws.scale_N[ids_B], draws.offset_N[ids_B], torch.bfloat16)
    compiled = torch.compile(aug.apply_torch, fullgraph=True)
    assert torch.equal(compiled(IMAGES_NHWC, ids_B, draws, table), plain)


def test_draws_are_spread_evenly():
    draws = aug.draw(Augment(crop_px=2, cutout_px=8, flip="random"), 50_000, 32, 0, 0, "cpu")
    shifts, counts = draws.shift_N2.unique(dim=0, return_counts=True)
    assert len(shifts) == 25
    assert shifts.min() == -2
    assert shifts.max() == 2
    assert 0.85 < counts.min() / 2000 <= counts.max() / 2000 < 1.15
    assert 0.48 < draws.mirror_N.float().mean() < 0.52
    assert draws.cutout_N2.min() == -4
    assert draws.cutout_N2.max() == 27


def test_alternating_flip_shows_both_sides_in_two_epochs():
    mirror = [aug.draw(Augment(flip="alternating"), 1000, 32, 7, epoch, "cpu").mirror_N for epoch in range(3)]
    assert torch.equal(mirror[0], ~mirror[1])
    assert torch.equal(mirror[0], mirror[2])
    assert 0.4 < mirror[0].float().mean() < 0.6


def test_seeds_epochs_and_streams_share_nothing():
    seen = [
        torch.randint(2**40, (4,), generator=aug.seeded(stream, seed, epoch)).tolist()
        for stream in (aug.ORDER, aug.DRAWS, aug.COIN)
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len({tuple(numbers) for numbers in seen}) == len(seen)


def test_normalised_by_mean_and_deviation():
    expected = (torch.arange(256)[None] / 255 - torch.tensor(aug.MEAN_C)[:, None]) / torch.tensor(aug.STD_C)[:, None]
    torch.testing.assert_close(aug.normalised_values("cpu"), expected)


@pytest.mark.parametrize("side_px", [4, 32])
def test_reflection_does_not_repeat_the_border(side_px):
    place = torch.arange(-3, side_px + 3)
    expected = F.pad(torch.arange(side_px).float()[None, None], (3, 3), "reflect")[0, 0].long()
    assert torch.equal(aug.reflect(place, side_px), expected)
