"""The two ways to augment agree bit for bit, and both do what their names say."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastcifar.loaders import augment as aug
from fastcifar.settings import Augment

IMAGES_NHWC = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))
EVERYTHING = Augment(crop_px=4, flip="random", cutout_px=9, brightness=0.2, contrast=0.3)


def apply_both(augment: Augment, dtype: torch.dtype, seed: int = 0, images_NHWC=IMAGES_NHWC):
    draws = aug.draw(augment, len(images_NHWC), images_NHWC.size(1), seed, 0)
    ids_B = torch.randperm(len(images_NHWC))[:30]
    ways = aug.apply_torch, aug.apply_numba
    return draws, ids_B, [apply(images_NHWC, ids_B, draws, ids_B, dtype) for apply in ways]


def normalised(image_CHW: torch.Tensor) -> torch.Tensor:
    mean_C, std_C = torch.tensor(aug.MEAN_C)[:, None, None], torch.tensor(aug.STD_C)[:, None, None]
    return (image_CHW.float() / 255 - mean_C) / std_C


@settings(max_examples=80, deadline=None)
@given(
    augment=st.builds(
        Augment,
        crop_px=st.integers(0, 31),
        border=st.sampled_from(["reflect", "black"]),
        flip=st.sampled_from(["none", "random", "alternating"]),
        rotate_deg=st.sampled_from([0.0]) | st.floats(0, 45),
        brightness=st.floats(0, 1),
        contrast=st.floats(0, 0.99),
        cutout_px=st.integers(0, 32),
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_numba_equals_torch(augment, dtype, seed):
    _, _, (plain, fast) = apply_both(augment, dtype, seed)
    assert fast.dtype == dtype
    assert torch.equal(plain, fast)
    assert fast.is_contiguous(memory_format=torch.channels_last)


def test_torch_equals_one_image_at_a_time():
    """Pad, crop, mirror, jitter, cut out: written down the way a textbook would."""
    draws, ids_B, (plain, _) = apply_both(EVERYTHING, torch.float32)
    for x_CHW, n in zip(plain, ids_B, strict=True):
        image = normalised(IMAGES_NHWC[n].permute(2, 0, 1)) * draws.scale_N[n] + draws.offset_N[n]
        row, column = (draws.shift_N2[n] + 4).tolist()
        padded = F.pad(image[None], (4,) * 4, "reflect")[0]
        # Mirrored first, then shifted: the shift of a mirrored image moves the other way.
        image = padded.flip(2) if draws.mirror_N[n] else padded
        image = image[:, row : row + 32, (8 - column if draws.mirror_N[n] else column) :][:, :, :32]
        top, left = draws.cutout_N2[n].tolist()
        image = image.clone()
        image[:, max(0, top) : max(0, top + 9), max(0, left) : max(0, left + 9)] = 0
        torch.testing.assert_close(x_CHW, image, rtol=0, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("augment", [EVERYTHING, Augment(3, "black", "random", rotate_deg=15.0)], ids=["all", "turn"])
def test_compiled_equals_eager(augment):
    """CUDA runs the compiled form; Inductor compiles it for the CPU as well."""
    draws, ids_B, (plain, _) = apply_both(augment, torch.bfloat16)
    compiled = torch.compile(aug.apply_torch, fullgraph=True)
    assert torch.equal(compiled(IMAGES_NHWC, ids_B, draws, ids_B, torch.bfloat16), plain)


def test_a_black_border_is_that_of_a_padded_image():
    draws, ids_B, (plain, _) = apply_both(Augment(crop_px=5, border="black", flip="none"), torch.float32)
    for x_CHW, n in zip(plain, ids_B, strict=True):
        row, column = (draws.shift_N2[n] + 5).tolist()
        padded_CHW = F.pad(IMAGES_NHWC[n].permute(2, 0, 1), (5,) * 4)[:, row : row + 32, column : column + 32]
        torch.testing.assert_close(x_CHW, normalised(padded_CHW), rtol=0, atol=1e-6)


def test_a_quarter_turn_is_exact():
    """No recipe turns that far, but there every pixel has one right place: counterclockwise, as torch.rot90."""
    draws = aug.draw(Augment(crop_px=0, flip="none", rotate_deg=1.0), len(IMAGES_NHWC), 32, 0, 0)
    ids_B = torch.arange(len(IMAGES_NHWC))
    draws = replace(draws, turn_N2=torch.tensor([[0, 1 << aug.TURN_BITS]]).repeat(len(ids_B), 1))
    plain_B = aug.draw(aug.PLAIN, len(IMAGES_NHWC), 32, 0, 0)
    for apply in (aug.apply_torch, aug.apply_numba):
        turned, plain = (apply(IMAGES_NHWC, ids_B, drawn, ids_B, torch.float32) for drawn in (draws, plain_B))
        assert torch.equal(turned, torch.rot90(plain, 1, (2, 3)))


def test_angles_are_spread_evenly():
    draws = aug.draw(Augment(rotate_deg=15.0), 50_000, 32, 0, 0)
    assert draws.angle_N.abs().max() <= 15
    counts = draws.angle_N.histc(10, -15, 15)
    assert 0.93 < counts.min() / 5000 <= counts.max() / 5000 < 1.07
    sine_N = draws.turn_N2[:, 1] / 2**aug.TURN_BITS
    torch.testing.assert_close(sine_N, draws.angle_N.deg2rad().sin(), rtol=0, atol=1e-5)


def test_draws_are_spread_evenly():
    draws = aug.draw(Augment(crop_px=2, cutout_px=8, flip="random"), 50_000, 32, 0, 0)
    shifts, counts = draws.shift_N2.unique(dim=0, return_counts=True)
    assert len(shifts) == 25
    assert shifts.min() == -2
    assert shifts.max() == 2
    assert 0.85 < counts.min() / 2000 <= counts.max() / 2000 < 1.15
    assert 0.48 < draws.mirror_N.float().mean() < 0.52
    assert draws.cutout_N2.min() == -4
    assert draws.cutout_N2.max() == 27


def test_alternating_flip_shows_both_sides_in_two_epochs():
    mirror = [aug.draw(Augment(flip="alternating"), 1000, 32, 7, epoch).mirror_N for epoch in range(3)]
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


@pytest.mark.parametrize("side_px", [4, 32])
def test_reflection_does_not_repeat_the_border(side_px):
    place = torch.arange(-3, side_px + 3)
    expected = F.pad(torch.arange(side_px).float()[None, None], (3, 3), "reflect")[0, 0].long()
    assert torch.equal(aug.reflect(place, side_px), expected)


# The kernel for a GPU. Without Triton's interpreter it is plain torch here: a second way to write the same down.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("augment", [
    aug.PLAIN,
    Augment(),
    Augment(crop_px=31, flip="random"),
    Augment(crop_px=5, border="black", flip="random", brightness=0.2, contrast=0.3),
], ids=["plain", "default", "far", "black"])  # fmt: skip
def test_kernel_equals_torch_and_numba(augment, dtype):
    draws, ids_B, (plain, fast) = apply_both(augment, dtype)
    found = aug.apply_kernel(IMAGES_NHWC, ids_B, draws, ids_B, dtype)
    assert torch.equal(found, plain)
    assert torch.equal(found, fast)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the run that the test starts")
def test_interpreted_kernel_equals_torch_and_numba():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "test_kernel_equals"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout


@pytest.mark.parametrize(("augment", "way"), [
    (Augment(), "kernel"),
    (Augment(crop_px=3, border="black", brightness=0.1), "kernel"),
    (Augment(rotate_deg=5.0), "compiled"),
    (Augment(cutout_px=4), "compiled"),
])  # fmt: skip
def test_a_gpu_takes_the_kernel_unless_something_is_rotated_or_cut_out(augment, way, monkeypatch):
    """A device without memory stands in for it."""
    taken = []
    monkeypatch.setattr(aug, "_compiled", lambda: lambda *_: taken.append("compiled"))
    monkeypatch.setattr(aug, "apply_kernel", lambda *_: taken.append("kernel"))
    draws = aug.draw(augment, len(IMAGES_NHWC), 32, 0, 0).to(torch.device("meta"))
    ids_B = torch.arange(8, device="meta")
    aug.apply(IMAGES_NHWC.to("meta"), ids_B, draws, ids_B, torch.bfloat16)
    assert taken == [way]
