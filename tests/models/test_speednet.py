"""The whitened convnet: what it knows before it learns, and what it accepts."""

from copy import deepcopy
from typing import cast

import pytest
import torch
from torch.nn import functional as F

from fastcifar.models.build import build_model
from fastcifar.models.speednet import BatchNorm, Conv, Group, SpeedNet
from fastcifar.settings import Recipe, SpeedNetModel
from fastcifar_kernels.conv_blocked import blocks_run


def needs_loops(dtype: torch.dtype) -> None:
    if not blocks_run(torch.empty(0, dtype=dtype)):
        pytest.skip("no loops for this type here")


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
    half = 12
    assert torch.equal(white_DN[:half], -white_DN[half : 2 * half])
    # The filters divide by the second moment of patches, which is what a mean-free image has for a covariance.
    moment_DD = white_DN[:half] @ white_DN[:half].T / white_DN.size(1)
    torch.testing.assert_close(moment_DD, torch.eye(half), atol=2e-3, rtol=0)
    # The mixtures are of unit variance, too, and the sum and difference of a pair are uncorrelated.
    mixed_DN = white_DN[2 * half :]
    moment_DD = mixed_DN @ mixed_DN.T / mixed_DN.size(1)
    torch.testing.assert_close(moment_DD.diagonal(), torch.ones(8), atol=2e-3, rtol=0)
    torch.testing.assert_close(moment_DD.diagonal(1)[::2], torch.zeros(4), atol=2e-3, rtol=0)


def test_mixtures_are_of_the_strongest_patches(images):
    model, plain = SpeedNet(10), SpeedNet(10, mixtures=False)
    for net in (model, plain):
        net.fit_whitening(images, eps=1e-3)
    assert torch.equal(model.whiten.weight[:24], plain.whiten.weight)
    norms_D = plain.whiten.weight[:12].flatten(1).norm(dim=1)  # one over the root of a patch's variance
    first, second = (plain.whiten.weight[place] for place in norms_D.argsort(descending=True)[-4:-2])
    torch.testing.assert_close(model.whiten.weight[24], (first + second) / 2**0.5)
    torch.testing.assert_close(model.whiten.weight[25], (first - second) / 2**0.5)


def test_a_new_convolution_passes_its_input_through():
    conv = Conv(4, 8)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(conv(x)[:, :4], x)


@pytest.mark.parametrize("image_px", [18, 20, 24, 32, 40])
def test_one_set_of_weights_serves_every_image_size(image_px):
    model = SpeedNet(7, (8, 16, 16))
    assert model(torch.randn(2, 3, image_px, image_px)).shape == (2, 7)


def test_ten_times_as_many_classes_learn_ten_times_as_fast(images):
    """A step of SGD moves a logit by its gradient's square."""
    squares = []
    for classes in (10, 100):
        torch.manual_seed(0)
        model = SpeedNet(classes, (8, 16, 16)).eval()
        [gradient] = torch.autograd.grad(model(images)[0, 0], model.head.weight)
        squares.append(gradient[0].square().sum())
    torch.testing.assert_close(squares[1], 10 * squares[0])


def test_parameter_count():
    """Whitening 32 x 12 + 32, convolutions 9 x (32 x 64 + 64² + 64 x 256 + 256² + 2 x 256²), 6 norms, head 2,560."""
    convolutions = 9 * (32 * 64 + 64**2 + 64 * 256 + 3 * 256**2)
    norms = 2 * 2 * (64 + 256 + 256)
    assert sum(p.numel() for p in SpeedNet(10).parameters()) == 32 * 12 + 32 + convolutions + norms + 2560


def test_compiles_without_a_graph_break():
    model = SpeedNet(10, (8, 8, 8)).eval()
    x = torch.randn(2, 3, 20, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_a_third_convolution_comes_with_a_residual():
    group = cast(Group, SpeedNet(7, (8, 16, 16), depth=3).groups[0]).eval()
    with torch.no_grad():
        for name, weight in group.named_parameters():  # nothing at the values that it begins with
            if "norm" not in name or "bias" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
        x_NCHW = torch.randn(2, 32, 10, 10).to(memory_format=torch.channels_last)
        first = F.gelu(group.norm1(F.max_pool2d(group.conv1(x_NCHW), 2)))
        third = F.gelu(group.norm3(group.conv3(F.gelu(group.norm2(group.conv2(first))))))
        torch.testing.assert_close(group(x_NCHW), first + third)


# With the kernel for BatchNorm and GELU, which only a GPU takes


@pytest.mark.parametrize("training", [True, False])
def test_fused_gelu_gives_what_pytorch_does(training, images, monkeypatch):
    """The loops for the CPU stand in for the kernel: their GELU is off by up to 5e-4 in its slope."""
    torch.manual_seed(0)
    fused = SpeedNet(7, (8, 16, 16), fused_gelu=True).train(training)
    plain = deepcopy(fused)
    asked = []
    monkeypatch.setattr(BatchNorm, "takes_kernel", lambda norm, x_NCHW: asked.append(x_NCHW) or norm.fused_gelu)
    for module in plain.modules():
        if isinstance(module, BatchNorm):
            module.fused_gelu = False
    found, expected = results(fused, images), results(plain, images)
    assert len(asked) == 2 * 6
    assert all(x_NCHW.is_contiguous(memory_format=torch.channels_last) for x_NCHW in asked)  # so nothing is copied
    assert found.keys() == expected.keys()
    assert len(found) == 1 + 3 * 6 + training * (2 + 12)
    for name, one in expected.items():
        assert (found[name] - one).double().norm() <= 1e-2 * one.double().norm(), name


def test_fused_gelu_changes_nothing_on_a_cpu(images):
    fused = SpeedNet(7, (8, 16, 16), fused_gelu=True)
    plain = SpeedNet(7, (8, 16, 16))
    plain.load_state_dict(fused.state_dict())
    assert torch.equal(fused(images), plain(images))


@pytest.mark.parametrize("fused", [True, False])
def test_a_recipe_says_whether_gelu_is_fused(fused):
    model = build_model(Recipe(model=SpeedNetModel(fused_gelu=fused)), 10, 0)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert [norm.fused_gelu for norm in norms] == [fused] * 6
    assert [norm.takes_kernel(torch.ones(1, 1, 1, 1)) for norm in norms] == [False] * 6


# On a CPU with AMX: images in groups of 32


def results(model: SpeedNet, x_NCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits, in training all gradients, and every buffer after it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=x_NCHW.dtype == torch.bfloat16):
        out_NK = model(x_NCHW).float()
    found = {"logits": out_NK.detach()}
    if model.training:
        F.cross_entropy(out_NK, torch.arange(len(out_NK)) % out_NK.size(1)).backward()
        found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("images", "training"), [(64, True), (64, False), (40, False)])
@pytest.mark.parametrize(("widths", "px", "depth"), [((32, 64, 32), 18, 2), ((64, 32, 96), 23, 3)])
def test_blocked_images_give_what_images_by_themselves_do(widths, px, depth, images, training, dtype, monkeypatch):
    """As far from float64 as the type is by itself: four times as much is allowed, and 1 % of all.

    Four, as a bias sums slopes up that nearly cancel: even with AMX, whose loops are as exact as PyTorch, it was off by
    0.5 to 2.1 times as much in eight draws. Of a float32 gradient, 3 %: GELU's slope is off by up to 5e-4.
    """
    needs_loops(dtype)
    torch.manual_seed(0)
    x_NCHW = torch.randn(images, 3, px, px).to(memory_format=torch.channels_last)
    blocked = SpeedNet(7, widths, depth)
    blocked.fit_whitening(x_NCHW, eps=1e-3)
    with torch.no_grad():
        for name, tensor in blocked.state_dict().items():  # nothing at the values that it begins with
            if name.endswith(("bias", "running_mean")):
                tensor.normal_(std=0.3)
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
    blocked.train(training)
    plain, exact = deepcopy(blocked), deepcopy(blocked).double()
    monkeypatch.setattr(plain, "blocks_pay", lambda _: False)
    assert blocked.blocks_pay(x_NCHW.to(dtype))
    found, expected = (results(model, x_NCHW.to(dtype)) for model in (blocked, plain))
    truth = results(exact, x_NCHW.double())
    assert found.keys() == expected.keys() == truth.keys()
    norms = 3 * depth
    assert len(found) == 1 + 3 * norms + training * (2 + 2 * norms)
    for name, true in truth.items():
        if name.endswith("num_batches_tracked"):
            assert found[name] == true == training
            continue
        assert found[name].dtype == expected[name].dtype, name
        share = 0.03 if dtype == torch.float32 and training else 0.01
        assert (found[name] - true).norm() <= 4 * (expected[name] - true).norm() + share * true.norm(), name


@pytest.mark.parametrize(("widths", "images", "training", "dtype"), [
    ((32, 32, 32), 40, True, torch.bfloat16),  # what fills a group up would count for BatchNorm
    ((32, 48, 32), 64, True, torch.bfloat16),
    ((32, 32, 8), 64, False, torch.bfloat16),
    ((32, 32, 32), 64, True, torch.float64),
])  # fmt: skip
def test_everything_else_takes_the_plain_path(widths, images, training, dtype):
    model = SpeedNet(7, widths).train(training)
    model = model.double() if dtype == torch.float64 else model
    x_NCHW = torch.randn(images, 3, 18, 18, dtype=dtype)
    assert not model.blocks_pay(x_NCHW)
    assert results(model, x_NCHW)["logits"].shape == (images, 7)


@pytest.mark.parametrize("what", ["images", "whitening"])
def test_what_has_no_gradient_in_blocks_gets_one_all_the_same(what):
    """Only the plain path gives it."""
    model = SpeedNet(7, (32, 32, 32)).eval()
    x_NCHW = torch.randn(32, 3, 18, 18)
    wanted = x_NCHW if what == "images" else model.whiten.weight
    wanted.requires_grad_()
    assert not model.blocks_pay(x_NCHW)
    model(x_NCHW).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.any()
    with torch.no_grad():
        assert model.blocks_pay(x_NCHW) == blocks_run(x_NCHW)


def test_blocked_images_compile_without_a_graph_break():
    needs_loops(torch.float32)
    model = SpeedNet(10, (32, 32, 32))
    x_NCHW = torch.randn(32, 3, 20, 20)
    assert model.blocks_pay(x_NCHW)
    compiled = torch.compile(deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x_NCHW), model(x_NCHW))
