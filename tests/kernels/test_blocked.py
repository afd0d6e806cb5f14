"""What `verify` does not see of the operators for blocked images, and of the GELU that they share."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar_kernels import amx, bn_gelu, conv_blocked, patches_gelu, verify
from fastcifar_kernels.bn_gelu import CUT, PHI, SLOPE, _samples, bn_gelu_reference
from fastcifar_kernels.conv_blocked import blocks_run, conv_blocked_reference
from fastcifar_kernels.patches_gelu import patches_gelu_reference

needs_amx = pytest.mark.skipif(not amx.available(), reason="no AMX here")
REFERENCES = {
    conv_blocked: conv_blocked_reference,
    bn_gelu: bn_gelu_reference,
    patches_gelu: patches_gelu_reference,
}


def needs_loops(dtype: torch.dtype) -> None:
    if not blocks_run(torch.empty(0, dtype=dtype)):
        pytest.skip("no loops for this type here")


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(operator: Callable, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """What this operator takes without complaint: 64 images, 32 channels."""
    if operator is conv_blocked:
        return {"x_GHWMC": normal(2, 4, 5, 32, 32, dtype=dtype), "w_OCHW": normal(64, 32, 3, 3) / 17}
    if operator is patches_gelu:
        return {"x_NCHW": normal(64, 3, 4, 5, dtype=dtype), "w_OCHW": normal(24, 3, 2, 2), "bias_O": normal(24)}
    running = {"running_mean_C": normal(32, seed=1), "running_var_C": normal(32, seed=2).square() + 0.1}
    return {"x_RC": normal(2, 4, 5, 32, 32, dtype=dtype), "bias_C": normal(32)} | running


def results(operator: Callable, given: dict[str, Tensor], grad: Tensor | None = None, **how) -> list[Tensor]:
    """The output, the gradients of what has any, and the running statistics after it."""
    constant = ("running_mean_C", "running_var_C", *(("x_NCHW", "w_OCHW") if "x_NCHW" in given else ()))
    leaves = {name: t.detach().requires_grad_() for name, t in given.items() if name not in constant}
    running = {name: t.clone() for name, t in given.items() if name.startswith("running")}
    out = operator(**(given | leaves | running), **how)
    grad = normal(*out.shape, seed=9).to(out.dtype) if grad is None else grad
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad), *running.values()]


def check_beside_reference(operator: Callable, given: dict[str, Tensor], **how) -> None:
    exact = {name: tensor.double() for name, tensor in given.items()}
    expected = results(REFERENCES[operator], exact, **how)
    for found, truth in zip(results(operator, given, **how), expected, strict=True):
        assert (found - truth).norm() <= 0.01 * truth.norm()


# What they take


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 1), (1, 3)])
def test_a_convolution_takes_single_rows_and_columns(height, width, dtype):
    needs_loops(dtype)
    check_beside_reference(
        conv_blocked, arguments(conv_blocked) | {"x_GHWMC": normal(2, height, width, 32, 32, dtype=dtype)}
    )


def slices(tensor: Tensor) -> Tensor:
    """The same values with NaN between them."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


def turned(tensor: Tensor) -> Tensor:
    """The same values, the last axis slowest."""
    return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))


def shifted(tensor: Tensor) -> Tensor:
    """The same values, contiguous, but at an address that is a multiple of their size alone."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return memory.copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


@pytest.mark.parametrize("filters", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lying", [slices, turned, shifted, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
@pytest.mark.parametrize("operator", REFERENCES)
def test_arguments_and_gradients_may_lie_in_any_order(operator, dtype, lying, filters):
    if operator is not bn_gelu:
        needs_loops(dtype)  # oneDNN rounds differently in each
    given = {name: t.to(filters) if name == "w_OCHW" else t for name, t in arguments(operator, dtype).items()}
    ways = [{"pool": False}, {"pool": True}] if operator is conv_blocked else [{}]
    for how in ways:
        grad = torch.randn_like(operator(**given, **how))
        expected = results(operator, given, grad, **how)
        found = results(operator, {name: lying(t) for name, t in given.items()}, lying(grad), **how)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_bias_and_running_statistics_may_be_of_another_type(dtype, training):
    """As `model.to(dtype)` leaves them."""
    given = arguments(bn_gelu, torch.float32)
    rest = {name: tensor.to(dtype) for name, tensor in given.items() if name != "x_RC"}
    found = results(bn_gelu, given | rest, training=training)
    wide = {name: tensor.float() for name, tensor in rest.items()}
    expected = results(bn_gelu, given | wide, training=training)
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.float32, dtype, dtype, dtype]
    torch.testing.assert_close([t.float() for t in found], expected, rtol=1e-2, atol=1e-2)


def test_no_images_give_none_and_gradients_of_zero():
    given = arguments(bn_gelu)
    out, grad_x, grad_bias, *_ = results(bn_gelu, given | {"x_RC": given["x_RC"][:0]}, training=False)
    assert out.shape == grad_x.shape == (0, *given["x_RC"].shape[1:])
    assert not grad_bias.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bn_gelu_passes_nan_and_infinity_in_one_value_on(value):
    given = arguments(bn_gelu, torch.float32)
    given["x_RC"][1, 2, 3, 30, 31] = value
    out = results(bn_gelu, given, training=False)[0]
    assert not out[1, 2, 3, 30, 31].isfinite()
    assert (~out.isfinite()).sum() == 1


def test_bn_gelu_of_rows_is_that_of_a_map():
    """However many axes the rows have, in whatever memory layout."""
    given = arguments(bn_gelu, torch.float32)
    grad = normal(2, 4, 5, 32, 32, seed=3)
    expected = results(bn_gelu, given, grad)
    found = results(bn_gelu, given | {"x_RC": given["x_RC"].flatten(0, -2)}, grad.flatten(0, -2))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.view(other.shape), other, rtol=1e-5, atol=1e-5)


def test_rows_on_a_gpu_are_one_sample_unless_32_bits_cannot_count_them():
    """A device without memory stands in for it."""
    assert _samples(torch.empty(3, 4, 5, 8, device="meta")).shape == (1, 60, 8)
    assert _samples(torch.empty(4, 2**14, 2**13, 8, device="meta")).shape == (4, 2**27, 8)
    assert _samples(torch.empty(3, 4, 5, 8)).shape == (3, 20, 8)
    assert _samples(torch.empty(60, 8)).shape == (1, 60, 8)


# torch.compile and autocast


class Network(nn.Module):
    """All three operators in a row: bfloat16 images to blocked ones."""

    def __init__(self):
        super().__init__()
        self.filters, self.bias = nn.Parameter(normal(24, 3, 2, 2), requires_grad=False), nn.Parameter(normal(24))
        self.conv = nn.Conv2d(32, 64, 3, bias=False)
        self.norm = nn.BatchNorm2d(64)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_GHWMC = conv_blocked(patches_gelu(x_NCHW, self.filters, self.bias), self.conv.weight, pool=True)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        return bn_gelu(x_GHWMC, self.norm.bias, self.norm.running_mean, self.norm.running_var)


def step(run: Callable, network: Network, x_NCHW: Tensor) -> dict[str, Tensor]:
    """What a training step computes: the output, all gradients, and the running statistics after it."""
    out = run(x_NCHW)
    network.zero_grad()
    out.float().square().mean().backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in network.named_buffers()} | {"out": out.detach()}


@pytest.mark.parametrize(("backend", "sizes"), [
    ("aot_eager", ((64, 5), (64, 5), (96, 7))),  # of a second size as well, with which dynamic shapes begin
    pytest.param(
        "inductor", ((64, 5), (64, 5)), marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
    ),
])  # fmt: skip
def test_compiled_equals_eager(backend, sizes):
    torch.manual_seed(0)
    torch._dynamo.reset()
    eager, compiled = Network(), Network()
    compiled.load_state_dict(eager.state_dict())
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    for n, px in sizes:
        x_NCHW = normal(n, 3, px, px, seed=n, dtype=torch.bfloat16)
        expected, found = step(eager, eager, x_NCHW), step(run, compiled, x_NCHW)
        assert {*found} == {"bias", "conv.weight", "norm.bias", "out"} | {
            f"norm.{name}" for name, _ in eager.norm.named_buffers()
        }
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("operator", REFERENCES)
def test_autocast_changes_nothing_inside_an_operator(operator):
    given = arguments(operator)
    expected = results(operator, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(operator, given)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# Bits


@pytest.mark.skipif(numba.get_num_threads() < 2, reason="a single thread is all there is")
@pytest.mark.parametrize("operator", REFERENCES)
def test_bits_do_not_depend_on_the_number_of_threads(operator):
    """But for the gradient of a convolution's filters, where every thread sums up what is its own."""
    before = numba.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            found.append(results(operator, arguments(operator)))
    finally:
        numba.set_num_threads(before)
    for number, (one, two) in enumerate(zip(*found, strict=True)):
        if (operator, number) == (conv_blocked, 2):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(one, two)


@needs_amx
def test_onednn_and_the_loops_leave_each_other_alone():
    """Both configure the tiles of the same threads."""
    x_GHWMC, filters = arguments(conv_blocked).values()
    x_NCHW, w_OCHW = normal(4, 64, 8, 8, dtype=torch.bfloat16), normal(64, 64, 3, 3, dtype=torch.bfloat16)
    expected = F.conv2d(x_NCHW, w_OCHW), conv_blocked(x_GHWMC, filters)
    for _ in range(2):
        assert torch.equal(F.conv2d(x_NCHW, w_OCHW), expected[0])
        assert torch.equal(conv_blocked(x_GHWMC, filters), expected[1])


def test_bn_gelu_in_bfloat16_is_float32_rounded_to_nearest_at_the_end():
    """But for the gradients, of which h, that before the normalisation, is rounded as well."""
    given, grad = arguments(bn_gelu), normal(2, 4, 5, 32, 32).bfloat16()
    wide = given | {"x_RC": given["x_RC"].float()}
    (out, grad_x, grad_bias, *found), (expected_out, expected_x, expected_bias, *expected) = (
        results(bn_gelu, given, grad),
        results(bn_gelu, wide, grad.float()),
    )
    for narrow, rounded in zip((out, *found), (expected_out, *expected), strict=True):
        torch.testing.assert_close(narrow, rounded.to(narrow.dtype), rtol=1e-5, atol=1e-5)
    rows = wide["x_RC"].flatten(0, -2)
    constant = {"running_mean_C": rows.mean(0), "running_var_C": rows.var(0, unbiased=False)}
    h = results(bn_gelu, wide | constant, grad.float(), training=False)[1].flatten(0, -2).abs()  # times the scale
    z = (rows - rows.mean(0)).abs() / rows.std(0, unbiased=False)
    half_a_bit = 2**-8  # of a value
    assert ((grad_bias - expected_bias).abs() <= half_a_bit * (h * rows.std(0, unbiased=False)).sum(0)).all()
    missed, expected_x = (grad_x.float() - expected_x).flatten(0, -2).abs(), expected_x.flatten(0, -2).abs()
    assert (missed <= half_a_bit * (1.01 * expected_x + h + h.mean(0) + z * (h * z).mean(0)) + 1e-6).all()


# What they compute


def test_gelu_is_as_close_as_verify_allows():
    """Everywhere: beyond the cut the polynomials are constant, and Phi and the slope nearly so."""
    t = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    s = t.clamp(-CUT, CUT)
    phi = torch.special.ndtr(t)
    slope = phi + t * (-t.square() / 2).exp() / (2 * torch.pi) ** 0.5
    for coefficients, truth, allowed in ((PHI, phi, verify.PHI_OFF), (SLOPE, slope, verify.SLOPE_OFF)):
        found = 0.5 + s * sum(float(c) * s ** (2 * power) for power, c in enumerate(coefficients))
        assert 0.9 * allowed < (found - truth).abs().max() < allowed


def test_running_statistics_move_as_in_batch_norm():
    norm, mean_C, var_C = nn.BatchNorm2d(8, momentum=0.3), torch.zeros(8), torch.ones(8)
    for seed in range(3):
        x_NHWC = normal(4, 5, 3, 8, seed=seed) * 2 + 3
        norm(x_NHWC.permute(0, 3, 1, 2))
        bn_gelu(x_NHWC, torch.zeros(8), mean_C, var_C, momentum=0.3)
        torch.testing.assert_close([mean_C, var_C], [norm.running_mean, norm.running_var])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_that_nobody_asked_for_are_not_given(dtype):
    needs_loops(dtype)
    given = arguments(conv_blocked, dtype)
    conv_blocked(given["x_GHWMC"], given["w_OCHW"].requires_grad_()).sum().backward()
    assert given["x_GHWMC"].grad is None
    alone = arguments(conv_blocked, dtype)
    conv_blocked(alone["x_GHWMC"].requires_grad_(), alone["w_OCHW"]).sum().backward()
    assert alone["w_OCHW"].grad is None
    assert alone["x_GHWMC"].grad is not None


@pytest.mark.parametrize("images", [1, 31, 33])
def test_patches_fill_the_last_group_up_with_something_finite(images):
    given = arguments(patches_gelu)
    x_NCHW = normal(images, 3, 4, 5, dtype=torch.bfloat16)
    out_GHWMO = patches_gelu(x_NCHW, given["w_OCHW"], given["bias_O"])
    assert out_GHWMO.shape == (-(-images // 32), 3, 4, 32, 32)
    assert out_GHWMO.isfinite().all()
    assert not out_GHWMO[..., 24:].any()


# What they refuse


def refusal(operator: Callable, given: dict, **how) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        operator(**given, **how)
    return str(caught.value)


CONV, BN, PATCHES = conv_blocked, bn_gelu, patches_gelu
BESIDE_X, BESIDE_IMAGES = "beside x_GHWMC of shape (2, 4, 5, 32, 32)", "beside x_NCHW of shape (64, 3, 4, 5)"
GROUPS = "x_GHWMC must have pixels, 32 images a group and a multiple of 32 channels, has shape"
IMAGES = "x_NCHW must be colour images of at least 2 x 2 pixels, has shape"


@pytest.mark.parametrize(("operator", "given", "how", "said"), [
    (CONV, {"x_GHWMC": (2, 4, 32, 32)}, {}, "x_GHWMC must have 5 dimensions, has shape (2, 4, 32, 32)."),
    (CONV, {"x_GHWMC": (2, 4, 5, 16, 32)}, {}, f"{GROUPS} (2, 4, 5, 16, 32)."),
    (CONV, {"x_GHWMC": (2, 4, 5, 32, 48)}, {}, f"{GROUPS} (2, 4, 5, 32, 48)."),
    (CONV, {"w_OCHW": (64, 64, 3, 3)}, {},
     f"w_OCHW must have shape (64, 32, 3, 3) {BESIDE_X}, has (64, 64, 3, 3)."),
    (CONV, {"w_OCHW": (64, 32, 3, 2)}, {},
     f"w_OCHW must have shape (64, 32, 3, 3) {BESIDE_X}, has (64, 32, 3, 2)."),
    (CONV, {"w_OCHW": (40, 32, 3, 3)}, {},
     "w_OCHW must have a multiple of 32 filters, has shape (40, 32, 3, 3)."),
    (CONV, {"x_GHWMC": (2, 0, 5, 32, 32)}, {}, f"{GROUPS} (2, 0, 5, 32, 32)."),
    (CONV, {"x_GHWMC": (2, 4, 5, 32, 0), "w_OCHW": (64, 0, 3, 3)}, {}, f"{GROUPS} (2, 4, 5, 32, 0)."),
    (CONV, {"w_OCHW": (0, 32, 3, 3)}, {}, "w_OCHW must have a multiple of 32 filters, has shape (0, 32, 3, 3)."),
    (CONV, {"x_GHWMC": (2, 1, 5, 32, 32)}, {"pool": True},
     "pooling needs at least 2 x 2 pixels, x_GHWMC has shape (2, 1, 5, 32, 32)."),
    (BN, {"x_RC": (32,)}, {"training": False}, "x_RC must have at least 2 dimensions, has shape (32,)."),
    (BN, {"bias_C": (31,)}, {},
     "bias_C must have shape (32,) beside x_RC of shape (2, 4, 5, 32, 32), has (31,)."),
    (BN, {"running_mean_C": (1, 32)}, {},
     "running_mean_C must have shape (32,) beside x_RC of shape (2, 4, 5, 32, 32), has (1, 32)."),
    (BN, {"x_RC": (1, 32)}, {}, "training needs at least two values per channel, x_RC has shape (1, 32)."),
    (PATCHES, {"x_NCHW": (64, 3, 4)}, {}, "x_NCHW must have 4 dimensions, has shape (64, 3, 4)."),
    (PATCHES, {"x_NCHW": (64, 4, 4, 5)}, {}, f"{IMAGES} (64, 4, 4, 5)."),
    (PATCHES, {"x_NCHW": (64, 3, 1, 5)}, {}, f"{IMAGES} (64, 3, 1, 5)."),
    (PATCHES, {"x_NCHW": (0, 3, 4, 5)}, {}, f"{IMAGES} (0, 3, 4, 5)."),
    (PATCHES, {"w_OCHW": (24, 3, 3, 3)}, {},
     f"w_OCHW must have shape (24, 3, 2, 2) {BESIDE_IMAGES}, has (24, 3, 3, 3)."),
    (PATCHES, {"bias_O": (32,)}, {}, "bias_O must have shape (24,) beside w_OCHW of shape (24, 3, 2, 2), has (32,)."),
    (PATCHES, {"w_OCHW": (33, 3, 2, 2), "bias_O": (33,)}, {},
     "w_OCHW must have 1 to 32 filters, has shape (33, 3, 2, 2)."),
])  # fmt: skip
def test_a_shape_is_refused(operator, given, how, said):
    fine = arguments(operator)
    wrong = {name: normal(*shape, dtype=fine[name].dtype) for name, shape in given.items()}
    assert refusal(operator, fine | wrong, **how) == said


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("size", [(2, 2**11, 2**16, 2**4), (2**27, 2**4)], ids=["maps", "rows"])
def test_bn_gelu_refuses_a_sample_of_2_to_the_31_elements(size, device):
    given = {name: torch.ones(16, device=device) for name in arguments(bn_gelu)}
    given["x_RC"] = torch.zeros(1, device=device).expand(size)  # a single element of memory
    assert f"{2**31:,} elements a sample: 2**31 are too many" in refusal(bn_gelu, given)


EVERY = [(operator, name) for operator in REFERENCES for name in arguments(operator)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=["int64", "float64"])
@pytest.mark.parametrize(("operator", "name"), EVERY)
def test_a_type_is_refused(operator, name, dtype):
    given = arguments(operator)
    expected = f"{name} must be float32, bfloat16 or float16, is {dtype}."
    assert refusal(operator, given | {name: given[name].to(dtype)}) == expected


@pytest.mark.parametrize(("operator", "name"), [one for one in EVERY if not one[1].startswith("x_")])
def test_another_device_is_refused(operator, name):
    given = arguments(operator)
    first = "w_OCHW" if name == "bias_O" else next(iter(given))
    expected = f"{name} is on meta, {first} is on cpu: move one of them."
    assert refusal(operator, given | {name: given[name].to("meta")}) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["x_NCHW", "w_OCHW"])
def test_gradients_that_patches_do_not_have_are_refused(name, dtype):
    needs_loops(dtype)
    given = arguments(patches_gelu, dtype)
    given[name].requires_grad_()
    assert refusal(patches_gelu, given) == (
        "x_NCHW and w_OCHW get no gradient here, and one of them requires it: detach it."
    )
    with torch.no_grad():
        patches_gelu(**given)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the run that the test starts")
def test_all_of_this_holds_for_the_interpreted_bn_gelu_too():
    """But for the rounding to bfloat16: Triton's interpreter cuts off."""
    which = "(bn_gelu or running_statistics or no_images) and not rounded_to_nearest"
    which += " and not number_of_threads and not (lie_in_any_order and bfloat16)"  # as there: no threads, no filters
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", which]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
