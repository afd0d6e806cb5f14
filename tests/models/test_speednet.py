"""The whitened convnet: what it knows before it learns, and what it accepts."""

import pytest
import torch
from torch.nn import functional as F

from fastcifar.models.speednet import Conv, SpeedNet


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth random images: neighbouring pixels are alike, as in photographs."""
    noise = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size=32, mode="bicubic").to(memory_format=torch.channels_last)


def test_whitening_gives_unit_variance_without_correlation(images):
    model = SpeedNet(10)
    model.fit_whitening(images, eps=0.0)
    assert model.whiten.bias is not None
    with torch.no_grad():
        model.whiten.bias.zero_()
        white_DN = model.whiten(images).transpose(0, 1).flatten(1)
    half = len(white_DN) // 2
    assert torch.equal(white_DN[:half], -white_DN[half:])
    # The filters divide by the second moment of patches, which is what a mean-free image has for a covariance.
    moment_DD = white_DN[:half] @ white_DN[:half].T / white_DN.size(1)
    torch.testing.assert_close(moment_DD, torch.eye(half), atol=2e-3, rtol=0)


def test_a_new_convolution_passes_its_input_through():
    conv = Conv(4, 8)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(conv(x)[:, :4], x)


@pytest.mark.parametrize("image_px", [18, 20, 24, 32, 40])
def test_one_set_of_weights_serves_every_image_size(image_px):
    model = SpeedNet(7, (8, 16, 16))
    assert model(torch.randn(2, 3, image_px, image_px)).shape == (2, 7)


def test_parameter_count():
    """Whitening 24 x 12 + 24, convolutions 9 x (24 x 64 + 64² + 64 x 256 + 256² + 2 x 256²), 6 norms, head 2,560."""
    convolutions = 9 * (24 * 64 + 64**2 + 64 * 256 + 3 * 256**2)
    norms = 2 * 2 * (64 + 256 + 256)
    assert sum(p.numel() for p in SpeedNet(10).parameters()) == 24 * 12 + 24 + convolutions + norms + 2560


def test_compiles_without_a_graph_break():
    model = SpeedNet(10, (8, 8, 8)).eval()
    x = torch.randn(2, 3, 20, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
