"""What `verify` does not see of bn_relu_pool: which elements dropout keeps, what is refused, and the layer."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastcifar.models.after_conv import AfterConv
from fastcifar_kernels import bn_relu_pool


def kept(*size: int, dropout: float, seed: int = 0) -> Tensor:
    """Which elements of a channels-last [N, C, H, W] one call keeps."""
    torch.manual_seed(seed)
    out = bn_relu_pool(torch.ones(size).contiguous(memory_format=torch.channels_last), dropout=dropout)
    factor = 1 / (1 - dropout) if dropout < 1 else 0
    assert set(out.unique().tolist()) <= {0.0, torch.tensor(factor).item()}
    return out > 0


@settings(deadline=None, max_examples=20)
@given(dropout=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_dropout_keeps_its_share_everywhere(dropout, seed):
    """Of all, and of every channel, row and column, within 6 standard deviations."""
    mask_NCHW = kept(64, 16, 16, 16, dropout=dropout, seed=seed).double()
    for dims in ((0, 1, 2, 3), (0, 2, 3), (1, 2, 3), (0, 1, 3), (0, 1, 2)):
        count = mask_NCHW.numel() / mask_NCHW.mean(dims).numel()
        allowed = 6 * (dropout * (1 - dropout) / count) ** 0.5
        assert (mask_NCHW.mean(dims) - (1 - dropout)).abs().max() < allowed


def test_dropout_of_neighbours_and_of_calls_is_independent():
    """No correlation between an element and the next channel, pixel, row or sample, nor between two calls."""
    torch.manual_seed(0)
    ones = torch.ones(64, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    first, second = (bn_relu_pool(ones, dropout=0.5).sub(1) for _ in range(2))  # +1 or -1
    allowed = 6 / first.numel() ** 0.5
    assert (first * second).mean().abs() < allowed
    for dim in range(4):
        assert (first * first.roll(1, dim)).mean().abs() < 1.1 * allowed
        assert (first * second.roll(1, dim)).mean().abs() < 1.1 * allowed


def test_dropout_follows_the_generator_of_torch():
    assert torch.equal(kept(2, 8, 4, 4, dropout=0.5), kept(2, 8, 4, 4, dropout=0.5))
    assert not torch.equal(kept(2, 8, 4, 4, dropout=0.5), kept(2, 8, 4, 4, dropout=0.5, seed=1))
    assert not kept(2, 8, 4, 4, dropout=1.0).any()
    before = torch.get_rng_state()
    x_NCHW = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bn_relu_pool(x_NCHW, dropout=0.5, training=False), x_NCHW.relu())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pool", [False, True])
def test_gradient_goes_where_dropout_let_the_value_through(pool):
    torch.manual_seed(3)
    x_NCHW = torch.rand(4, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    out_NCHW = bn_relu_pool(x_NCHW, dropout=0.5, pool=pool)
    (grad_NCHW,) = torch.autograd.grad(out_NCHW.sum(), x_NCHW)
    assert set(grad_NCHW.unique().tolist()) == {0.0, 2.0}
    assert out_NCHW.sum().item() == pytest.approx((grad_NCHW * x_NCHW).sum().item(), rel=1e-5)
    assert (grad_NCHW > 0).sum() == (out_NCHW > 0).sum()


def test_nan_and_infinity_pass():
    x_NCHW = torch.zeros(1, 2, 2, 2)
    x_NCHW[0, 0, 0, 1], x_NCHW[0, 1, 1, 0] = torch.nan, torch.inf
    out_NCHW = bn_relu_pool(x_NCHW, pool=True)
    assert out_NCHW.flatten().isnan().tolist() == [True, False]
    assert out_NCHW[0, 1, 0, 0] == torch.inf


def test_no_images_give_none():
    assert bn_relu_pool(torch.empty(0, 8, 4, 4), pool=True).shape == (0, 8, 2, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x_NCHW": torch.ones(2, 8, 4)}, "x_NCHW must have 4 dimensions"),
        ({"x_NCHW": torch.ones(2, 8, 4, 4, dtype=torch.int64)}, "x_NCHW must be float32, bfloat16 or float16"),
        ({"weight_C": torch.ones(7)}, "weight_C must have shape (8,)"),
        ({"bias_C": None}, "weight_C and bias_C go together"),
        ({"running_var_C": torch.ones(9)}, "running_var_C must have shape (8,)"),
        ({"running_var_C": None, "training": False}, "running_mean_C and running_var_C are needed"),
        ({"x_NCHW": torch.ones(1, 8, 1, 1)}, "training needs at least two values"),
        ({"dropout": 1.5}, "dropout must be from 0 to 1, is 1.5"),
    ],
)
def test_refused(given, said):
    fine: dict[str, Any] = {"x_NCHW": torch.ones(2, 8, 4, 4)} | {name: torch.ones(8) for name in ("weight_C", "bias_C")}
    fine |= {name: torch.ones(8) for name in ("running_mean_C", "running_var_C")}
    bn_relu_pool(**fine)
    with pytest.raises(ValueError, match=r".") as caught:
        bn_relu_pool(**(fine | given))
    assert said in str(caught.value)


# The layer


@pytest.mark.parametrize("batchnorm", [False, True])
def test_layer_equals_the_layers_it_stands_for(batchnorm):
    """Outputs, gradients and running statistics over three steps, then in eval mode."""
    torch.manual_seed(0)
    layer = AfterConv(8, batchnorm=batchnorm, slope=0.1, pool=True)
    norm = nn.BatchNorm2d(8) if batchnorm else nn.Identity()
    plain = nn.Sequential(norm, nn.LeakyReLU(0.1), nn.Dropout(0.0), nn.MaxPool2d(2))
    for step in range(4):
        if step == 3:
            layer.eval()
            plain.eval()
        x_NCHW = torch.randn(4, 8, 7, 6, requires_grad=True)
        outs = layer(x_NCHW), plain(x_NCHW)
        grads = [torch.autograd.grad(out.square().sum(), (x_NCHW, *part.parameters()))
                 for out, part in zip(outs, (layer, plain), strict=True)]  # fmt: skip
        torch.testing.assert_close(outs[0], outs[1])
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(list(layer.buffers())[:2], list(plain.buffers())[:2])


def test_layer_compiles_in_one_piece_with_dropout():
    layer = AfterConv(8, dropout=0.5, pool=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x_NCHW = torch.randn(4, 8, 6, 6, requires_grad=True)
    first, second = compiled(x_NCHW), compiled(x_NCHW)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert x_NCHW.grad is not None
    assert x_NCHW.grad.any()
