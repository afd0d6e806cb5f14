"""What `verify` does not see of crop_flip: its bits, what it makes of nonsense, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar_kernels import crop_flip
from fastcifar_kernels.crop_flip import crop_flip_reference

N, B, H, W = 5, 4, 14, 17
INTERPRETED = "TRITON_INTERPRET" in os.environ


def arguments() -> dict[str, Any]:
    """What it takes without complaint; two pieces an image in float32."""
    generator = torch.Generator().manual_seed(0)
    return {
        "images_NHWC": torch.randint(256, (N, H, W, 3), generator=generator, dtype=torch.uint8),
        "ids_B": torch.tensor([4, 0, 2, 4]),
        "shift_B2": torch.tensor([[0, 0], [H - 1, 1 - W], [-3, 2], [1 - H, W - 1]]),
        "mirror_B": torch.tensor([True, False, True, False]),
        "gain_BC": torch.randn(B, 3, generator=generator),
        "bias_BC": torch.randn(B, 3, generator=generator),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("border", ["reflect", "black"])
def test_the_bits_are_those_of_plain_torch(border, dtype):
    expected = crop_flip_reference(**arguments(), border=border, dtype=dtype)
    if INTERPRETED and dtype == torch.bfloat16:  # there Triton's interpreter cuts off where a GPU rounds
        wide = crop_flip_reference(**arguments(), border=border)
        expected = (wide.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()
    found = crop_flip(**arguments(), border=border, dtype=dtype)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, expected)


def test_one_pixel_at_a_time():
    """Written down the way a textbook would: mirror, then look so many pixels below and right of each place."""
    given = arguments()
    found = crop_flip(**given, border="black")
    for b in range(B):
        image_HWC = given["images_NHWC"][given["ids_B"][b]]
        down, right = given["shift_B2"][b].tolist()
        for row in range(H):
            for column in range(W):
                y, x = row + down, (W - 1 - column if given["mirror_B"][b] else column) + right
                byte_C = image_HWC[y, x] if 0 <= y < H and 0 <= x < W else torch.zeros(3)
                value_C = byte_C * given["gain_BC"][b] + given["bias_BC"][b]
                assert torch.equal(found[b, :, row, column], value_C)


def test_arguments_may_be_slices_of_larger_tensors():
    given = arguments()
    sliced: dict[str, Any] = {name: torch.stack([t, torch.ones_like(t)], -1)[..., 0] for name, t in given.items()}
    assert not any(tensor.is_contiguous() for tensor in sliced.values())
    assert torch.equal(crop_flip(**sliced), crop_flip(**given))


def test_an_empty_batch_gives_none():
    given = {name: tensor if name == "images_NHWC" else tensor[:0] for name, tensor in arguments().items()}
    assert crop_flip(**given, dtype=torch.bfloat16).shape == (0, 3, H, W)


def test_no_gradient_is_promised():
    given = arguments()
    given["gain_BC"].requires_grad_()
    assert not crop_flip(**given).requires_grad


@pytest.mark.skipif(not INTERPRETED, reason="plain torch raises IndexError")
def test_an_image_that_is_not_there_is_nan_and_nothing_is_read():
    """Far enough away to crash if it were."""
    given = arguments()
    given["ids_B"] = torch.tensor([2**40, -1, N, 2])
    found = crop_flip(**given)
    assert found[:3].isnan().all()
    assert torch.equal(found[3:], crop_flip_reference(**{k: t if t.size(0) == N else t[3:] for k, t in given.items()}))


@pytest.mark.parametrize("border", ["reflect", "black"])
def test_a_shift_beyond_every_pixel_is_black(border):
    given = arguments()
    given["shift_B2"] = torch.full((B, 2), 3 * W)
    found = crop_flip(**given, border=border)
    assert torch.equal(found, given["bias_BC"][:, :, None, None].expand(B, 3, H, W))


@pytest.mark.parametrize(("given", "said"), [
    ({"images_NHWC": torch.zeros(N, H, W, 4, dtype=torch.uint8)}, "images_NHWC must be [N, H, W, 3] and not empty"),
    ({"images_NHWC": torch.zeros(0, H, W, 3, dtype=torch.uint8)}, "images_NHWC must be [N, H, W, 3] and not empty"),
    ({"images_NHWC": torch.zeros(H, W, 3, dtype=torch.uint8)}, "images_NHWC must be [N, H, W, 3] and not empty"),
    ({"images_NHWC": torch.zeros(N, H, W, 3)}, "images_NHWC must be uint8, is torch.float32."),
    ({"ids_B": torch.zeros(B, 1).long()}, "ids_B must have 1 dimension, has shape (4, 1)."),
    ({"ids_B": torch.zeros(B).int()}, "ids_B must be int64, is torch.int32."),
    ({"shift_B2": torch.zeros(B, 3).long()}, "shift_B2 must have shape (4, 2) beside 4 ids, has (4, 3)."),
    ({"shift_B2": torch.zeros(B, 2)}, "shift_B2 must be int64, is torch.float32."),
    ({"mirror_B": torch.zeros(B + 1).bool()}, "mirror_B must have shape (4,) beside 4 ids, has (5,)."),
    ({"mirror_B": torch.zeros(B).long()}, "mirror_B must be bool, is torch.int64."),
    ({"mirror_B": torch.zeros(B, device="meta").bool()},
     "mirror_B is on meta, images_NHWC is on cpu: move one of them."),
    ({"gain_BC": torch.zeros(3)},
     "gain_BC must have shape (4, 3) beside images_NHWC of shape (5, 14, 17, 3), has (3,)."),
    ({"gain_BC": torch.zeros(B, 3).bfloat16()}, "gain_BC must be float32, is torch.bfloat16."),
    ({"bias_BC": torch.zeros(B, 3, device="meta")}, "bias_BC is on meta, images_NHWC is on cpu: move one of them."),
    ({"border": "wrap"}, "border must be reflect or black, is wrap."),
    ({"dtype": torch.uint8}, "dtype must be float32, bfloat16 or float16, is torch.uint8."),
])  # fmt: skip
def test_refused(given, said):
    with pytest.raises(ValueError, match=r".") as caught:
        crop_flip(**(arguments() | given))
    assert str(caught.value).startswith(said)


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test starts")
def test_all_of_this_holds_for_the_interpreted_kernel_too():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
