"""Muon against its definition."""

import pytest
import torch

from fastcifar.optim.muon import QUINTIC, Muon, orthogonalize, orthogonalize_all
from fastcifar_kernels import vectors


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24), (8, 1)])
def test_update_has_the_same_directions_and_singular_values_near_one(shape):
    g_OD = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(g_OD, full_matrices=False)
    update = orthogonalize(g_OD, steps=5).float()
    inner = u.T @ update @ vh.T
    singular = inner.diagonal()
    assert singular.min() > 0.5
    assert singular.max() < 1.4
    assert (inner - torch.diag(singular)).abs().max() < 0.1


def defined(g_SOD: torch.Tensor, steps: int) -> torch.Tensor:
    """In exact arithmetic each step maps every singular value s to a s + b s³ + c s⁵."""
    g_SOD = g_SOD.double()
    u, s, vh = torch.linalg.svd(g_SOD / g_SOD.norm(dim=(-2, -1), keepdim=True), full_matrices=False)
    a, b, c = QUINTIC
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ vh


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (2, 12, 30)])
def test_iteration_is_the_quintic_on_singular_values(shape, steps, monkeypatch):
    monkeypatch.delitem(vectors.LANES, torch.bfloat16, raising=False)  # so that it is in float32
    g_SOD = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    update = orthogonalize(g_SOD, steps)
    assert update.dtype == torch.float32
    torch.testing.assert_close(update.double(), defined(g_SOD, steps), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("steps", "error"), [(3, 0.03), (5, 0.06), (9, 0.1)])
def test_roundings_to_bfloat16_stay_small(steps, error, monkeypatch):
    """Of singular values from 1 to 0.01: with four iterations at once five steps had an error of 0.4."""
    monkeypatch.setitem(vectors.LANES, torch.bfloat16, 16)
    generator = torch.Generator().manual_seed(2)
    u, _, vh = torch.linalg.svd(torch.randn(64, 300, generator=generator), full_matrices=False)
    g_OD = u @ torch.diag(torch.logspace(0, -2, 64)) @ vh
    update, expected = orthogonalize(g_OD, steps), defined(g_OD, steps)
    assert update.dtype == torch.bfloat16
    assert (update.double() - expected).norm() / expected.norm() < error


def test_what_a_processor_does_not_multiply_is_not_imitated(monkeypatch):
    """A step of `speed` took 1.4 s in Muon alone where bfloat16 was imitated, and 0.04 s in float32."""
    g_OD = torch.randn(12, 30, generator=torch.Generator().manual_seed(1))
    monkeypatch.delitem(vectors.LANES, torch.bfloat16, raising=False)
    exact = orthogonalize(g_OD, 3)
    monkeypatch.setitem(vectors.LANES, torch.bfloat16, 16)
    rounded = orthogonalize(g_OD, 3)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.01)


def test_each_expert_of_a_stack_learns_as_if_alone():
    generator = torch.Generator().manual_seed(3)
    stack = torch.nn.Parameter(torch.randn(3 * 8, 4, 3, 3, generator=generator))
    alone = [torch.nn.Parameter(own.clone()) for own in stack.detach().chunk(3)]
    stack.grad = torch.randn(stack.shape, generator=generator)
    for own, grad in zip(alone, stack.grad.chunk(3), strict=True):
        own.grad = grad.clone()
    Muon([{"params": [stack], "experts": 3}], lr=0.1, momentum=0.6).step()
    Muon(alone, lr=0.1, momentum=0.6).step()
    torch.testing.assert_close(stack.detach(), torch.cat([own.detach() for own in alone]))


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16)])
def test_matrices_of_one_shape_go_together_as_each_goes_alone(shape):
    g_SOD = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    alone = torch.stack(list(orthogonalize_all(list(g_SOD), 3)))
    torch.testing.assert_close(orthogonalize(g_SOD, 3), alone, rtol=0.02, atol=0.02)


def test_the_learning_rate_may_be_a_tensor():
    generator = torch.Generator().manual_seed(5)
    both = [torch.nn.Parameter(torch.randn(8, 3, 3, 3, generator=generator)) for _ in range(2)]
    both[1].data.copy_(both[0].data)
    grad = torch.randn(8, 3, 3, 3, generator=generator)
    for weight, lr in zip(both, (0.1, torch.tensor(0.1)), strict=True):
        weight.grad = grad.clone()
        Muon([weight], lr=lr, momentum=0.6).step()
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)


def test_zero_gradient_moves_nothing():
    assert orthogonalize(torch.zeros(4, 9), 3).abs().max() == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad_layout", [torch.contiguous_format, torch.channels_last])
def test_step_is_nesterov_orthogonalised_renormalised(layout, grad_layout):
    generator = torch.Generator().manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(8, 3, 3, 3, generator=generator).to(memory_format=layout))
    optimizer = Muon([weight], lr=0.1, momentum=0.6)
    expected, velocity = weight.detach().clone(), torch.zeros_like(weight)
    for _ in range(3):
        weight.grad = torch.randn(weight.shape, generator=generator).to(memory_format=grad_layout)
        velocity = 0.6 * velocity + weight.grad
        update = orthogonalize((weight.grad + 0.6 * velocity).flatten(1), 3).view(weight.shape)
        expected = expected * (8**0.5 / expected.norm()) - 0.1 * update.float()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)
