"""Policies, saturation and hue are torchvision's, image by image, however many are painted at once."""

import numpy as np
import pytest
import torch

from fastcifar.data.download import import_torchvision
from fastcifar.errors import UsageError
from fastcifar.loaders import augment as aug
from fastcifar.loaders.repaint import NOTHING, draw_strokes, make_strokes, policy_parts, saturate, turn_hue
from fastcifar.settings import Augment

import_torchvision()

from torchvision.transforms import v2  # noqa: E402
from torchvision.transforms.v2 import functional  # noqa: E402

IMAGES_NHWC = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8))
IMAGES_NHWC[0] = 0
IMAGES_NHWC[1] = 255
IMAGES_NHWC[2, ..., 1] = IMAGES_NHWC[2, ..., 0]
IMAGES_NHWC[3, ..., 2] = IMAGES_NHWC[3, ..., 0]
IMAGES_NCHW = IMAGES_NHWC.permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.8, 1.0, 1.2, 2.0])
def test_saturation_is_that_of_torchvision(factor):
    found = saturate(IMAGES_NCHW, torch.full((40, 1, 1, 1), factor))
    expected = functional.adjust_saturation(IMAGES_NCHW, factor)
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("turns", [-0.5, -0.21, -0.1, 0.0, 0.05, 0.33, 0.5])
def test_hue_is_that_of_torchvision(turns):
    found = turn_hue(IMAGES_NCHW, torch.full((40, 1, 1), turns))
    expected = functional.adjust_hue(IMAGES_NCHW, turns)
    assert (found.int() - expected.int()).abs().max() <= 1


def torchvisions(policy: str) -> v2.Transform:
    return v2.RandAugment() if policy == "randaugment" else v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment"])
def test_a_policy_paints_what_torchvision_does(policy):
    """Of 400 images that torchvision made, nearly all are among 4,000 of ours."""
    image_CHW = IMAGES_NCHW[5]
    torch.manual_seed(0)
    theirs = {torchvisions(policy)(image_CHW).numpy().tobytes() for _ in range(400)}
    strokes_N2 = draw_strokes(policy, 4000, 32, torch.Generator().manual_seed(0))
    x_NCHW = image_CHW.expand(4000, 3, 32, 32)
    for strokes_N in strokes_N2.unbind(1):
        x_NCHW = make_strokes(x_NCHW, policy, strokes_N)
    ours = {x_CHW.numpy().tobytes() for x_CHW in x_NCHW}
    assert len(theirs & ours) > 0.97 * len(theirs)


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment"])
def test_strokes_do_not_depend_on_the_batch(policy):
    """Every stroke there is, to the bit: alone, or with the other images that get it."""
    strokes = policy_parts(policy, 32)[0]
    assert strokes[0] == NOTHING
    for stroke in range(len(strokes)):
        together = make_strokes(IMAGES_NCHW, policy, torch.full((40,), stroke))
        for n in range(0, 40, 3):
            alone = make_strokes(IMAGES_NHWC[n : n + 1].permute(0, 3, 1, 2), policy, torch.tensor([stroke]))
            assert torch.equal(alone[0], together[n]), strokes[stroke]


def test_strokes_are_drawn_evenly():
    strokes, _, _ = policy_parts("randaugment", 32)
    strokes_N2 = draw_strokes("randaugment", 56_000, 32, torch.Generator().manual_seed(0))
    times = torch.bincount(strokes_N2.flatten(), minlength=len(strokes)) / 4000
    signed = {name for name, magnitude in strokes if (name, -magnitude) in strokes and magnitude}
    assert len(signed) == 9
    for (name, _), count in zip(strokes, times.tolist(), strict=True):
        assert count == pytest.approx(1 if name in signed else 2, rel=0.1), name


def test_recipes_without_them_draw_what_they_drew_before():
    """The new draws come last."""
    plain, painted = (
        aug.draw(augment, 50, 32, 3, 1)
        for augment in (Augment(brightness=0.1), Augment(brightness=0.1, policy="randaugment", saturation=0.2, hue=0.1))
    )
    for name in ("shift_N2", "mirror_N", "scale_N", "offset_N"):
        assert torch.equal(getattr(plain, name), getattr(painted, name))
    assert painted.saturation_N.min() >= 0.8
    assert painted.hue_N.abs().max() <= 0.1
    assert len(painted.strokes_N2.unique()) > 10


@pytest.mark.parametrize(
    ("field", "augment"),
    [("policy", Augment(policy="autoaugment")), ("saturation", Augment(saturation=0.1)), ("hue", Augment(hue=0.1))],
)
def test_dali_refuses_by_name(feed, field, augment):
    with pytest.raises(UsageError, match=f"--augment.{field}: --loader dali cannot do it"):
        feed("dali").loader("train", batch_size=10, augment=augment)
