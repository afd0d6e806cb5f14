"""The convolution that a CPU may compute as matrix products, or in blocks."""

import pytest
import torch
from torch import nn

from fastcifar.models import conv
from fastcifar.models.conv import Conv2d, use_conv2d
from fastcifar_kernels import vectors

BLOCKS, PRODUCTS = "conv_in_blocks", "conv_matmul"


@pytest.fixture
def taken(monkeypatch):
    """The ways that were taken, by name."""
    names = []
    for name in (BLOCKS, PRODUCTS):
        way = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *given, name=name, way=way: names.append(name) or way(*given))
    return names


def without_amx(monkeypatch, dtype) -> None:
    """As on a processor that has the vectors and nothing more."""
    monkeypatch.setattr(conv.amx, "available", lambda: False)
    if dtype not in vectors.LANES:
        pytest.skip("this processor has no loops for this type")


@pytest.mark.parametrize(
    ("channels", "px", "dtype", "how", "expected"),
    [
        (256, 4, torch.bfloat16, {}, PRODUCTS),
        (256, 5, torch.bfloat16, {}, None),  # 25 pixels, 18 times 64 KiB of filters
        (64, 4, torch.bfloat16, {}, None),
        (256, 4, torch.bfloat16, {"stride": 2}, None),
        (256, 4, torch.bfloat16, {"bias": True}, None),
        (256, 4, torch.bfloat16, {"padding": 0}, None),
        (256, 4, torch.bfloat16, {"groups": 2}, None),
    ],
)
def test_with_amx_it_is_nn_conv2d_either_way(channels, px, dtype, how, expected, taken, monkeypatch):
    monkeypatch.setattr(conv.amx, "available", lambda: True)
    compare(channels, px, dtype, how)
    assert taken == ([expected] if expected else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("channels", "px", "images", "how", "blocked"),
    [
        (64, 5, 2, {}, True),
        (32, 8, 67, {}, True),  # more than two groups of 32
        (64, 2, 2, {}, False),
        (48, 5, 2, {}, False),
        (64, 5, 2, {"stride": 2}, False),
    ],
)
def test_without_amx_it_is_nn_conv2d_too(channels, px, images, dtype, how, blocked, taken, monkeypatch):
    without_amx(monkeypatch, dtype)
    compare(channels, px, dtype, how, images)
    assert taken == ([BLOCKS] if blocked else [])


def compare(channels: int, px: int, dtype: torch.dtype, how: dict, images: int = 2) -> None:
    """Its output and gradients beside nn.Conv2d's."""
    torch.manual_seed(0)
    own = Conv2d(channels, channels, 3, **{"padding": 1, "bias": False} | how)
    plain = nn.Conv2d(channels, channels, 3, **{"padding": 1, "bias": False} | how)
    plain.load_state_dict(own.state_dict())
    x_NCHW = torch.randn(images, channels, px, px).contiguous(memory_format=torch.channels_last)
    results = []
    for module in (own, plain):
        leaf = x_NCHW.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = module(leaf)
        out.float().square().sum().backward()
        results.append((out.detach(), leaf.grad, module.weight.grad))
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)
    for mine, torchs in zip(*results, strict=True):
        assert mine.dtype == torchs.dtype
        assert (mine - torchs).norm() <= (0.03 if dtype == torch.bfloat16 else 1e-5) * torchs.norm()


def test_convolutions_of_a_whole_model_are_replaced_and_keep_their_weights():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 4, 1)))
    before = model.state_dict()
    x_NCHW = torch.randn(2, 3, 4, 4)
    expected = model(x_NCHW)
    use_conv2d(model)
    assert [type(part) for part in model.modules() if isinstance(part, nn.Conv2d)] == [Conv2d, Conv2d]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x_NCHW), expected)


@pytest.mark.parametrize("px", [2, 3])
def test_it_compiles_in_one_piece(px, taken, monkeypatch):
    without_amx(monkeypatch, torch.bfloat16)
    module = Conv2d(256, 256, 3, padding=1, bias=False)
    x_NCHW = torch.randn(2, 256, px, px)

    def run(x_NCHW):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x_NCHW)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_NCHW), run(x_NCHW))
    assert set(taken) == {BLOCKS if px > 2 else PRODUCTS}
