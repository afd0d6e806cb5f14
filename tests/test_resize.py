"""The loop that resizes images on a CPU is held to torch's own, to the rounding of the last bit."""

import pytest
import torch
from torch.nn import functional as F

from fastcifar.resize import resize


def torch_resize(x_NCHW: torch.Tensor, image_px: int) -> torch.Tensor:
    return F.interpolate(x_NCHW.float(), size=image_px, mode="bilinear", antialias=True)


def images(dtype: torch.dtype, count: int = 5, channels: int = 3, side_px: int = 32) -> torch.Tensor:
    x_NCHW = torch.randn(count, channels, side_px, side_px, generator=torch.Generator().manual_seed(1))
    return x_NCHW.to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("image_px", [18, 20, 24, 31, 33, 64])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 0), (torch.bfloat16, 2**-8)])
def test_it_is_torchs_resizing_rounded_once(dtype, rounding, image_px):
    x_NCHW = images(dtype)
    found, expected = resize(x_NCHW, image_px), torch_resize(x_NCHW, image_px)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Sums in another order differ by up to 5e-7; rounding one of those to bfloat16 adds half a unit in the last place.
    torch.testing.assert_close(found.float(), expected, rtol=1.01 * rounding, atol=2e-6)


def test_rows_are_not_columns():
    x_NCHW = torch.zeros(1, 3, 32, 32)
    x_NCHW[:, 1, :, 7] = 1  # a line from top to bottom, green
    found = resize(x_NCHW, 20)
    torch.testing.assert_close(found, torch_resize(x_NCHW, 20), rtol=0, atol=2e-6)
    assert found[0, 1].std(0).max() < 1e-6 < found[0, 1].std(1).min()


@pytest.mark.parametrize("layout", ["contiguous", "gaps", "turned"])
def test_any_layout_of_images(layout):
    x_NCHW = images(torch.bfloat16, count=6)
    given = {
        "contiguous": x_NCHW.contiguous(),
        "gaps": x_NCHW[::2],
        "turned": x_NCHW.flip(3),
    }[layout]
    assert torch.equal(resize(given, 20), resize(given.contiguous(memory_format=torch.channels_last).clone(), 20))


def test_images_of_that_size_are_left_alone():
    x_NCHW = images(torch.bfloat16)
    assert resize(x_NCHW, 32) is x_NCHW


def test_half_precision_goes_through_torch():
    x_NCHW = images(torch.float16)
    torch.testing.assert_close(resize(x_NCHW, 24).float(), torch_resize(x_NCHW, 24), rtol=2**-11, atol=2e-6)


def test_no_images():
    assert resize(images(torch.float32)[:0], 20).shape == (0, 3, 20, 20)
