"""The convolution that a CPU may compute as matrix products."""

import pytest
import torch
from torch import nn

from fastcifar.models import conv
from fastcifar.models.conv import Conv2d, use_conv2d


@pytest.fixture
def taken(monkeypatch):
    """How often the matrix products were taken."""
    calls = []
    kernel = conv.conv_matmul
    monkeypatch.setattr(conv, "conv_matmul", lambda *given: calls.append(given) or kernel(*given))
    return calls


@pytest.mark.parametrize(
    ("channels", "px", "dtype", "how", "expected"),
    [
        (256, 4, torch.bfloat16, {}, True),
        (256, 5, torch.bfloat16, {}, False),  # 25 pixels, 18 times 64 KiB of filters
        (256, 4, torch.float32, {}, False),
        (64, 4, torch.bfloat16, {}, False),
        (256, 4, torch.bfloat16, {"stride": 2}, False),
        (256, 4, torch.bfloat16, {"bias": True}, False),
        (256, 4, torch.bfloat16, {"padding": 0}, False),
        (256, 4, torch.bfloat16, {"groups": 2}, False),
    ],
)
def test_it_is_nn_conv2d_either_way(channels, px, dtype, how, expected, taken):
    torch.manual_seed(0)
    own = Conv2d(channels, channels, 3, **{"padding": 1, "bias": False} | how)
    plain = nn.Conv2d(channels, channels, 3, **{"padding": 1, "bias": False} | how)
    plain.load_state_dict(own.state_dict())
    x_NCHW = torch.randn(2, channels, px, px).contiguous(memory_format=torch.channels_last)
    results = []
    for module in (own, plain):
        leaf = x_NCHW.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = module(leaf)
        out.float().square().sum().backward()
        results.append((out.detach(), leaf.grad, module.weight.grad))
    assert bool(taken) == expected
    for mine, torchs in zip(*results, strict=True):
        assert mine.dtype == torchs.dtype
        assert (mine - torchs).norm() <= 0.01 * torchs.norm()


def test_convolutions_of_a_whole_model_are_replaced_and_keep_their_weights():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 4, 1)))
    before = model.state_dict()
    x_NCHW = torch.randn(2, 3, 4, 4)
    expected = model(x_NCHW)
    use_conv2d(model)
    assert [type(part) for part in model.modules() if isinstance(part, nn.Conv2d)] == [Conv2d, Conv2d]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x_NCHW), expected)


def test_it_compiles_in_one_piece(taken):
    module = Conv2d(256, 256, 3, padding=1, bias=False)
    x_NCHW = torch.randn(2, 256, 2, 2)

    def run(x_NCHW):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x_NCHW)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_NCHW), run(x_NCHW))
    assert taken
