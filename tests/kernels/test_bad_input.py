"""What the operators refuse, with a message that says why, and the unusual input that they take."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcifar_kernels import (
    aggregate_weights,
    batch_statistics,
    bn_relu_weighted_sum,
    conv_blocked,
    conv_matmul,
    scaled_copies,
    weighted_sum,
)

N, K, C, H, W = 2, 4, 8, 3, 5
HUGE = 2**31


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def experts(*size: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, K, C, H, W] as a channels-last convolution leaves them."""
    n, k, c, h, w = size
    return normal(n, h, w, k, c, seed=seed, dtype=dtype).permute(0, 3, 4, 1, 2)


def arguments(operator) -> dict[str, Any]:
    """What this operator takes without complaint."""
    y_NKCHW, coef_NK = experts(N, K, C, H, W), normal(N, K)
    if operator is scaled_copies:
        return {"x_NCHW": normal(N, C, H, W), "coef_NK": coef_NK}
    if operator is conv_matmul:
        return {"x_NCHW": normal(N, C, H, W), "w_OCHW": normal(6, C, 3, 3)}
    if operator is conv_blocked:
        return {"x_GHWMC": normal(N, H, W, 32, 32), "w_OCHW": normal(32, 32, 3, 3)}
    if operator is aggregate_weights:
        return {"w_KOIHW": normal(K, C, 6, 3, 3), "coef_NK": coef_NK}
    if operator is batch_statistics:
        return {"y_NKCHW": y_NKCHW}
    maps = {"y_NKCHW": y_NKCHW, "coef_NK": coef_NK, "residual_NCHW": normal(N, C, H, W)}
    if operator is weighted_sum:
        return maps
    running = {"running_mean_KC": normal(K, C), "running_var_KC": normal(K, C).square()}
    return maps | {"weight_KC": normal(K, C), "bias_KC": normal(K, C)} | running


OPERATORS = (
    weighted_sum,
    bn_relu_weighted_sum,
    aggregate_weights,
    scaled_copies,
    batch_statistics,
    conv_matmul,
    conv_blocked,
)
EVERY = [(op, name) for op in OPERATORS for name in arguments(op)]
FREE = (
    ("coef_NK", 0, aggregate_weights),
    ("coef_NK", 1, scaled_copies),
    ("w_OCHW", 0, conv_matmul),
    ("w_OCHW", 0, conv_blocked),
)
BESIDE = [(op, name) for op, name in EVERY if name not in ("y_NKCHW", "w_KOIHW", "x_NCHW", "x_GHWMC")]


def named(value) -> str | None:
    """A readable name for an operator or a type, in the name of a test."""
    return value.__name__ if callable(value) else str(value).removeprefix("torch.")


def refusal(operator, given: dict, **rest) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        operator(**given, **rest)
    return str(caught.value)


@pytest.mark.parametrize("operator", [weighted_sum, bn_relu_weighted_sum, aggregate_weights, scaled_copies], ids=named)
def test_the_examples_below_are_fine_but_for_one_thing(operator):
    operator(**arguments(operator))


@pytest.mark.parametrize(("operator", "name", "dim"), [
    (op, name, dim) for op, name in BESIDE for dim in range({"residual_NCHW": 4}.get(name, 2))
    if (name, dim, op) not in FREE  # these are free
], ids=named)  # fmt: skip
def test_a_size_that_does_not_match_is_refused_with_both_shapes(operator, name, dim):
    given = arguments(operator)
    first, shape = next(iter(given)), list(given[name].shape)
    shape[dim] += 1
    message = refusal(operator, given | {name: normal(*shape)})
    assert message.startswith(name)
    assert str(tuple(shape)) in message
    assert f"{first} of shape {tuple(given[first].shape)}" in message


@pytest.mark.parametrize("more", [False, True], ids=["too few", "too many"])
@pytest.mark.parametrize(("operator", "name"), EVERY, ids=named)
def test_a_wrong_number_of_dimensions_is_refused(operator, name, more):
    given = arguments(operator)
    wrong = given[name][None] if more else given[name][0]
    message = refusal(operator, given | {name: wrong})
    assert message.startswith(name)
    assert str(tuple(wrong.shape)) in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64, torch.complex64], ids=named)
@pytest.mark.parametrize(("operator", "name"), EVERY, ids=named)
def test_other_types_are_refused(operator, name, dtype):
    given = arguments(operator)
    message = refusal(operator, given | {name: given[name].to(dtype)})
    assert message.startswith(name)
    assert str(dtype) in message


@pytest.mark.parametrize("operator", [weighted_sum, bn_relu_weighted_sum, aggregate_weights], ids=named)
def test_no_experts_are_refused(operator):
    given = arguments(operator)
    none = {name: t[:0] if name[:2] in ("w_", "we", "bi", "ru") else t for name, t in given.items()}
    none |= {name: given[name][:, :0] for name in ("y_NKCHW", "coef_NK") if name in given}
    rest = {"training": False} if operator is bn_relu_weighted_sum else {}
    assert next(iter(given)) in refusal(operator, none, **rest)


def test_no_copies_are_refused():
    given = arguments(scaled_copies)
    assert refusal(scaled_copies, given | {"coef_NK": given["coef_NK"][:, :0]}).startswith("coef_NK")


def test_a_result_of_another_type_is_refused():
    assert refusal(aggregate_weights, arguments(aggregate_weights), dtype=torch.float64).startswith("dtype")


@pytest.mark.parametrize(("operator", "name"), BESIDE, ids=named)
def test_another_device_is_refused(operator, name):
    given = arguments(operator)
    message = refusal(operator, given | {name: given[name].to("meta")})
    assert message.startswith(name)
    assert "meta" in message
    assert "cpu" in message


@pytest.mark.parametrize("operator", [weighted_sum, bn_relu_weighted_sum], ids=named)
def test_a_residual_of_another_type_is_refused(operator):
    given = arguments(operator)
    message = refusal(operator, given | {"residual_NCHW": given["residual_NCHW"].bfloat16()})
    assert message.startswith("residual_NCHW")
    assert "bfloat16" in message
    assert "float32" in message


def test_training_with_one_value_per_channel_is_refused():
    given = {
        "y_NKCHW": experts(1, K, C, 1, 1),
        "coef_NK": normal(1, K),
        "weight_KC": normal(K, C),
        "bias_KC": normal(K, C),
    }
    message = refusal(bn_relu_weighted_sum, given)
    assert "y_NKCHW" in message
    assert str((1, K, C, 1, 1)) in message


@pytest.mark.parametrize("missing", ["running_mean_KC", "running_var_KC"])
def test_eval_without_running_statistics_is_refused(missing):
    given = arguments(bn_relu_weighted_sum)
    assert missing in refusal(bn_relu_weighted_sum, given | {missing: None}, training=False)


def test_statistics_of_nothing_are_refused():
    message = refusal(batch_statistics, {"y_NKCHW": experts(0, K, C, H, W)})
    assert message.startswith("y_NKCHW")
    assert str((0, K, C, H, W)) in message


BILLIONS = {
    weighted_sum: (N, K, 2**9, 2**10, 2**10),
    bn_relu_weighted_sum: (N, K, 2**9, 2**10, 2**10),
    batch_statistics: (N, K, 2**9, 2**10, 2**10),
    aggregate_weights: (K, 2**10, 2**11, 2**5, 2**5),
    scaled_copies: (N, 2**9, 2**10, 2**10),  # and K of each
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("operator", BILLIONS, ids=named)
def test_a_sample_of_2_to_the_31_elements_is_refused(operator, device):
    given = {name: tensor.to(device) for name, tensor in arguments(operator).items()}
    shape, one = BILLIONS[operator], torch.zeros(1, device=device)
    message = refusal(operator, given | {next(iter(given)): one.expand(shape)})  # a single element of memory
    assert f"{2**31:,}" in message
    assert str(shape[1:])[1:-1] in message


# What they take


def leaves(given: dict[str, Any]) -> dict[str, Any]:
    return {name: t.clone().requires_grad_(not name.startswith("running")) for name, t in given.items()}


@pytest.mark.parametrize("operator", [op for op in OPERATORS if op is not batch_statistics], ids=named)
def test_an_empty_batch_gives_nothing_and_gradients_of_zero(operator):
    per_sample = ("y_NKCHW", "x_NCHW", "x_GHWMC", "coef_NK", "residual_NCHW")
    given = leaves({name: t[:0] if name in per_sample else t for name, t in arguments(operator).items()})
    rest = {"training": False} if operator is bn_relu_weighted_sum else {}
    out = operator(**given, **rest)
    assert out.shape == (0, *operator(**arguments(operator), **rest).shape[1:])
    out.sum().backward()
    for name, tensor in given.items():
        if tensor.requires_grad:
            assert tensor.grad is not None, name
            assert tensor.grad.shape == tensor.shape
            assert not tensor.grad.any()


@pytest.mark.parametrize("operator", [weighted_sum, bn_relu_weighted_sum, aggregate_weights], ids=named)
def test_nan_in_a_coefficient_makes_exactly_its_sample_nan(operator):
    """0 * NaN is NaN, so the ReLU hides nothing."""
    given = arguments(operator)
    given["coef_NK"][1, 2] = torch.nan
    out = operator(**given)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


def test_nan_in_a_coefficient_makes_exactly_its_copy_nan():
    given = arguments(scaled_copies)
    given["coef_NK"][1, 2] = torch.nan
    nan_NK = scaled_copies(**given).isnan().flatten(2)
    assert nan_NK[1, 2].all()
    assert nan_NK.sum() == nan_NK[1, 2].numel()


@pytest.mark.parametrize("operator", [weighted_sum, bn_relu_weighted_sum], ids=named)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_in_one_value_come_out_in_one(operator, value):
    """As through torch.relu, which keeps NaN."""
    given = arguments(operator)
    given["y_NKCHW"] = given["y_NKCHW"].clone()
    given["y_NKCHW"][1, 2, 3, 0, 4] = value
    if operator is bn_relu_weighted_sum:
        given["weight_KC"].abs_()  # so that infinity stays on the side that passes
    out = operator(**given, **({"training": False} if operator is bn_relu_weighted_sum else {}))
    assert not out[1, 3, 0, 4].isfinite()
    assert (~out.isfinite()).sum() == 1


def test_nan_in_training_spoils_its_channel_as_in_torch():
    given = arguments(bn_relu_weighted_sum)
    given["y_NKCHW"] = given["y_NKCHW"].clone()
    given["y_NKCHW"][1, 2, 3, 0, 4] = torch.nan
    nan_C = bn_relu_weighted_sum(**given).isnan().transpose(0, 1).flatten(1)
    assert nan_C[3].all()
    assert nan_C.sum() == nan_C[3].numel()


def test_samples_that_lie_2_to_the_31_elements_apart():
    """Memory is committed where it is written, so the 4 GB cost nothing."""
    k, c, h, w = 2, 8, 2, 3
    memory = torch.empty(HUGE + k * c * h * w, dtype=torch.bfloat16)
    y_NKCHW = memory.as_strided((2, k, c, h, w), (HUGE, c, 1, w * k * c, k * c))
    y_NKCHW.copy_(normal(2, k, c, h, w))
    coef_NK, near_NKCHW = normal(2, k), y_NKCHW.clone()
    affine = normal(k, c), normal(k, c)
    for function in (
        lambda y: weighted_sum(y, coef_NK),
        lambda y: batch_statistics(y)[1],
        lambda y: bn_relu_weighted_sum(y, coef_NK, *affine),
    ):
        assert torch.equal(function(y_NKCHW), function(near_NKCHW))
    far, near = y_NKCHW.detach().requires_grad_(), near_NKCHW.requires_grad_()
    (far_grad,) = torch.autograd.grad(bn_relu_weighted_sum(far, coef_NK, *affine).square().sum(), far)
    (near_grad,) = torch.autograd.grad(bn_relu_weighted_sum(near, coef_NK, *affine).square().sum(), near)
    assert torch.equal(far_grad, near_grad)


LYING = {
    "expanded": lambda out: torch.ones(()).expand_as(out),
    "sliced": lambda out: normal(*out.shape[:-1], 2 * out.size(-1), seed=3)[..., ::2],
    "transposed": lambda out: normal(*reversed(out.shape), seed=3).permute(*reversed(range(out.dim()))),
    "expanded samples": lambda out: normal(*out.shape[1:], seed=3).expand_as(out),
}


@pytest.mark.parametrize("lying", LYING)
@pytest.mark.parametrize("operator", [weighted_sum, bn_relu_weighted_sum, aggregate_weights, scaled_copies], ids=named)
def test_incoming_gradients_may_lie_in_any_order(operator, lying):
    given = leaves(arguments(operator))
    out = operator(**given)
    wanted = [tensor for tensor in given.values() if tensor.requires_grad]
    grad = LYING[lying](out)
    plain = torch.autograd.grad(out, wanted, grad.contiguous(), retain_graph=True)
    for found, expected in zip(torch.autograd.grad(out, wanted, grad), plain, strict=True):
        assert torch.equal(found, expected)


def test_a_sum_can_be_differentiated():
    """Its gradient is one number, expanded."""
    given = leaves(arguments(weighted_sum))
    weighted_sum(**given).sum().backward()
    grad, coef_NK = given["y_NKCHW"].grad, given["coef_NK"]
    assert grad is not None
    assert torch.equal(grad, coef_NK[:, :, None, None, None].expand_as(grad))


@pytest.mark.parametrize("operator", [weighted_sum, bn_relu_weighted_sum, aggregate_weights, scaled_copies], ids=named)
def test_arguments_may_be_slices_of_larger_tensors(operator):
    given = arguments(operator)
    sliced = {name: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for name, t in given.items()}
    assert not any(tensor.is_contiguous() for tensor in sliced.values())
    assert torch.equal(operator(**sliced), operator(**given))


@pytest.mark.parametrize("operator", [weighted_sum, bn_relu_weighted_sum, batch_statistics], ids=named)
def test_maps_may_lie_apart_with_nan_in_between(operator):
    """Experts that are read where they lie: gaps between channels, experts, columns and samples."""
    given = leaves(arguments(operator))
    gaps = torch.full((2 * N, H, W, 2 * K, C + 3), torch.nan)
    gaps[::2, ..., ::2, :C] = given["y_NKCHW"].detach().permute(0, 3, 4, 1, 2)
    apart = given | {"y_NKCHW": gaps[::2, ..., ::2, :C].permute(0, 3, 4, 1, 2).requires_grad_()}
    if operator is batch_statistics:
        assert torch.equal(batch_statistics(**apart)[1], batch_statistics(**given)[1])
        return
    found, expected = operator(**apart), operator(**given)
    assert torch.equal(found, expected)
    for name in ("y_NKCHW", "coef_NK"):
        one, other = (torch.autograd.grad(o.square().sum(), t[name], retain_graph=True)
                      for o, t in ((found, apart), (expected, given)))  # fmt: skip
        assert torch.equal(*one, *other)


def test_a_sample_that_ends_just_below_2_to_the_31_is_refused_too():
    """Its last tile would reach beyond, where 32 bits turn negative."""
    y_NKCHW = torch.zeros(1).expand(1, 1, 1, 2**16 - 1, 2**15)
    with pytest.raises(ValueError, match=r"2,147,450,880 elements a sample: 2\*\*31 are too many"):
        weighted_sum(y_NKCHW, torch.zeros(1, 1))


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the run that the test starts")
def test_all_of_this_holds_for_the_interpreted_kernels_too():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
