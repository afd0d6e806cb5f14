import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.models import dynamic
from fastcifar.models.dynamic import FORMS, DynamicConv2d, Gate


def images(n: int = 5, channels: int = 8, rows: int = 9, columns: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    x_NCHW = torch.randn(n, channels, rows, columns, generator=generator)
    return x_NCHW.to(memory_format=torch.channels_last)


def k_loop(block: DynamicConv2d, x_NCHW: Tensor) -> Tensor:
    """The definition, one expert after the other."""
    experts, channels_out = block.split
    coef_NK, out = block.gate(x_NCHW), torch.zeros(())
    for k in range(experts):
        part = slice(k * channels_out, (k + 1) * channels_out)
        y_NOHW = F.conv2d(x_NCHW, block.conv.weight[part], stride=block.conv.stride, padding=block.conv.padding)
        if block.norm is not None:
            y_NOHW = F.relu(F.batch_norm(y_NOHW, None, None, block.norm.weight[part], block.norm.bias[part], True))
        out = out + coef_NK[:, k, None, None, None] * y_NOHW
    return out if block.shortcut is None else out + block.shortcut(x_NCHW)


def channels_last(block: DynamicConv2d) -> DynamicConv2d:
    return block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def with_gradients(function, block: DynamicConv2d, x_NCHW: Tensor) -> list[Tensor]:
    x_NCHW = x_NCHW.detach().requires_grad_()
    out_NOHW = function(x_NCHW)
    weights = torch.linspace(-1, 1, out_NOHW.numel()).view_as(out_NOHW)
    return [out_NOHW, *torch.autograd.grad((out_NOHW * weights).sum(), [x_NCHW, *block.parameters()])]


def assert_alike(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.detach().abs().max()) + 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("squash", ["softmax", "sigmoid", "raw"])
@pytest.mark.parametrize(("channels_out", "stride", "residual"), [(8, 1, True), (12, 2, True), (12, 1, False)])
def test_every_form_is_the_k_loop(form, squash, channels_out, stride, residual):
    torch.manual_seed(0)
    block = channels_last(DynamicConv2d(8, channels_out, 3, stride=stride, residual=residual, form=form, squash=squash))
    x_NCHW = images()
    out = with_gradients(block, block, x_NCHW)
    assert out[0].is_contiguous(memory_format=torch.channels_last)
    assert_alike(out, with_gradients(lambda x_NCHW: k_loop(block, x_NCHW), block, x_NCHW))


@pytest.mark.parametrize(("channels_out", "residual"), [(8, True), (12, True), (12, False)])
def test_with_batchnorm_and_relu_it_is_the_k_loop_with_both(channels_out, residual):
    torch.manual_seed(0)
    block = DynamicConv2d(8, channels_out, 4, norm=True, residual=residual, hidden=5, temperature=3.0)
    assert block.norm is not None
    nn.init.uniform_(block.norm.weight, -1, 1)
    nn.init.normal_(block.norm.bias)
    x_NCHW = images()
    ours = with_gradients(block, block, x_NCHW)
    assert_alike(ours, with_gradients(lambda x_NCHW: k_loop(block, x_NCHW), block, x_NCHW))


def test_eval_mode_uses_the_running_statistics_that_training_gathered():
    block = DynamicConv2d(8, 4, 2, norm=True)
    for _ in range(100):
        trained = block(images())
    evaluated = block.eval()(images())
    torch.testing.assert_close(evaluated, trained, rtol=1e-2, atol=1e-2)  # n / (n - 1) of the variance apart
    alone = block(images()[:1])
    torch.testing.assert_close(alone, evaluated[:1])


def test_the_gate_is_what_its_arguments_say():
    x_NCHW = images()
    means_NC = x_NCHW.mean(dim=(2, 3))
    gate = Gate(8, 3, hidden=5, squash="softmax", temperature=30.0)
    logits_NK = gate.layers[2](F.relu(gate.layers[0](means_NC)))
    torch.testing.assert_close(gate(x_NCHW), (logits_NK / 30).softmax(dim=1))
    assert gate(x_NCHW).sum(dim=1).allclose(torch.ones(5))
    gate = Gate(8, 3, squash="raw")
    torch.testing.assert_close(gate(x_NCHW), gate.layers[0](means_NC))
    gate.squash = "sigmoid"
    torch.testing.assert_close(gate(x_NCHW), gate.layers[0](means_NC).sigmoid())


def test_auto_measures_a_shape_once_and_takes_the_fastest(monkeypatch):
    asked = []

    def pretend(block, x_NCHW, coef_NK, backward):
        asked.append((tuple(x_NCHW.shape), backward))
        return {"outputs": 3.0, "weights": 2.0, "inputs": 1.0 if len(x_NCHW) == 5 else 4.0}

    monkeypatch.setattr(dynamic, "time_forms", pretend)
    monkeypatch.setattr(dynamic, "_fastest", {})
    block = DynamicConv2d(8, 4, 2)
    block(images(5))
    assert block.chosen == "inputs"
    block(images(5))
    block(images(3))
    assert block.chosen == "weights"
    with torch.no_grad():
        block(images(3))
    assert asked == [((5, 8, 9, 6), True), ((3, 8, 9, 6), True), ((3, 8, 9, 6), False)]


def test_measuring_leaves_gradients_random_numbers_and_results_as_they_were():
    block, x_NCHW = DynamicConv2d(8, 4, 2), images(4)
    forced = copy.deepcopy(block)
    before = torch.get_rng_state()
    times_s = dynamic.time_forms(block, x_NCHW, block.gate(x_NCHW), backward=True)
    assert set(times_s) == set(FORMS)
    assert all(seconds > 0 for seconds in times_s.values())
    assert all(parameter.grad is None for parameter in block.parameters())
    assert torch.equal(before, torch.get_rng_state())
    out = block(x_NCHW)
    forced.form = block.chosen
    assert torch.equal(out, forced(x_NCHW))


@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_it_compiles_into_one_graph(form):
    block = DynamicConv2d(8, 4, 2, residual=True, form=form)
    x_NCHW = images(3)
    eager = with_gradients(block, block, x_NCHW)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_alike(with_gradients(compiled, block, x_NCHW), eager)


def test_with_batchnorm_it_compiles_into_one_graph_that_updates_the_running_statistics():
    block = DynamicConv2d(8, 4, 2, norm=True)
    twin, x_NCHW = copy.deepcopy(block), images(3)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_alike(with_gradients(compiled, block, x_NCHW), with_gradients(twin, twin, x_NCHW))
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(block.named_buffers())[name], buffer)
    assert bool(dict(twin.named_buffers())["norm.running_mean"].any())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", [False, True])
def test_autocast_computes_in_bfloat16_and_leaves_float32_gradients(form, norm):
    block = channels_last(DynamicConv2d(8, 4, 2, norm=norm, residual=True, form="outputs" if norm else form))
    with torch.autocast("cpu", torch.bfloat16):
        out_NOHW = block(images())
    assert out_NOHW.dtype == torch.bfloat16
    out_NOHW.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in block.parameters())
    expected = block(images())
    assert (out_NOHW.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_two_uses_before_one_backward_add_up():
    block = DynamicConv2d(8, 8, 2, norm=True)
    x_NCHW = images()
    separately = [with_gradients(block, block, x_NCHW)[2:], with_gradients(block, block, -x_NCHW)[2:]]
    weights = torch.linspace(-1, 1, x_NCHW.numel()).view_as(x_NCHW)
    together = ((block(x_NCHW) + block(-x_NCHW)) * weights).sum()
    together.backward()
    for parameter, first, second in zip(block.parameters(), *separately, strict=True):
        torch.testing.assert_close(parameter.grad, first + second, rtol=1e-4, atol=1e-4)


def test_a_form_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="form must be one of outputs, weights, inputs or auto, is 'fast'"):
        DynamicConv2d(8, 4, form="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form='weights' does not go with norm=True"):
        DynamicConv2d(8, 4, norm=True, form="weights")
