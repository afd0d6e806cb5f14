"""Do the kernels compute what they should? Every operator, forward and backward, against the same in float64.

python -m fastcifar_kernels.verify [--op NAME ...]

What is allowed is not a constant but derived from each input: twice what plain torch in the same type gets wrong, plus
twice what a float32 rounding of every argument changes (a sum of a few values may be exact in torch by luck) and what
the polynomials in place of GELU are off, plus one rounding of the result, and where a convolution multiplies
transformed images (`conv_winograd.py`) four more, and 32 of float32. Every tensor that a kernel writes is filled
with NaN first, and every tensor that it reads or writes lies between strips of NaN: what is not written, or read from
outside, shows. Each is run twice (but not in the interpreter) and must give the same bits.

With a GPU the compiled kernels are run; without one the numba loops for CPU tensors, and the Triton kernels in Triton's
interpreter on small shapes. Exit code 1 if anything misses.
"""

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from triton import knobs

from fastcifar_kernels import (
    aggregate_weights,
    amx,
    batch_statistics,
    bn_gelu,
    bn_relu_pool,
    bn_relu_weighted_sum,
    conv_blocked,
    conv_matmul,
    crop_flip,
    patches_gelu,
    scaled_copies,
    tiles,
    vectors,
    weighted_sum,
)
from fastcifar_kernels.aggregate_weights import aggregate_weights_reference
from fastcifar_kernels.batch_statistics import batch_statistics_reference
from fastcifar_kernels.bn_gelu import bn_gelu_reference
from fastcifar_kernels.bn_relu_pool import bn_relu_pool_reference
from fastcifar_kernels.bn_relu_weighted_sum import bn_relu_weighted_sum_reference
from fastcifar_kernels.conv_blocked import conv_blocked_reference, transforms
from fastcifar_kernels.conv_matmul import conv_matmul_reference
from fastcifar_kernels.crop_flip import Border, crop_flip_reference
from fastcifar_kernels.guarded import guarding
from fastcifar_kernels.layout import runs_triton
from fastcifar_kernels.patches_gelu import patches_gelu_reference
from fastcifar_kernels.scaled_copies import scaled_copies_reference
from fastcifar_kernels.weighted_sum import weighted_sum_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OF_BLOCKS = ("conv_blocked", "patches_gelu")  # with other loops on other processors, or none
OPERATORS = (
    "weighted_sum",
    "scaled_copies",
    "batch_statistics",
    "bn_relu_weighted_sum",
    "aggregate_weights",
    "bn_gelu",
    "crop_flip",
)
OF_THE_CPU = ("bn_relu_pool", "conv_matmul", *OF_BLOCKS)  # without a Triton kernel
SHAKES = 4
# How far the polynomials in the loops of `bn_gelu` are off at most: Phi, where GELU is u * Phi(u), and GELU's slope.
# Measured by tests/kernels/test_blocked.py. The Triton kernels have none.
PHI_OFF, SLOPE_OFF = 1.4e-5, 4.8e-4
POOL_VARIANTS = {
    "": {},
    "NCHW": {},
    "gaps": {"pool": True},
    "eval": {"training": False},
    "pool": {"pool": True},
    "pool, eval": {"pool": True, "training": False},
    "pool, leaky, no norm": {"pool": True, "slope": 0.25},
    "leaky, no norm": {"slope": 0.25},
    "dropout": {"dropout": 0.3},
    "dropout, pool": {"dropout": 0.5, "pool": True},
}

# Winograd's transformations enlarge roundings of what is multiplied, and their own: so many of these they may cost.
TRANSFORMED, TRANSFORMING = 4, 32

aggregation = sys.modules["fastcifar_kernels.aggregate_weights"]
banded = sys.modules["fastcifar_kernels.conv_amx"]
blocked = sys.modules["fastcifar_kernels.conv_blocked"]
tiled = sys.modules["fastcifar_kernels.conv_winograd"]
products = sys.modules["fastcifar_kernels.conv_matmul"]
statistics = sys.modules["fastcifar_kernels.batch_statistics"]

# N, K, C, H, W: ragged everywhere, single samples and experts, channels below, at and above a block.
SMALL = (
    (2, 4, 16, 4, 4),
    (1, 1, 8, 5, 3),
    (5, 3, 7, 2, 3),
    (2, 8, 32, 1, 1),
    (1, 16, 9, 3, 2),
    (2, 2, 130, 3, 5),
)
MEDIUM = (
    *SMALL,
    (3, 6, 12, 3, 3),
    (2, 2, 64, 9, 9),
    (2100, 2, 3, 1, 1),
    (32, 4, 64, 16, 16),
    (16, 3, 20, 11, 13),
    (8, 16, 128, 8, 8),
    (1, 4, 256, 32, 32),
)
BLOCKED_ELEMENTS = 8_000  # of a shape, at most, to make groups of 32 images from: in float64 more take long
LARGE = (*MEDIUM, (512, 4, 64, 32, 32), (512, 4, 128, 16, 16), (512, 4, 512, 8, 8), (64, 16, 200, 7, 9))


@dataclass(frozen=True)
class Case:
    """One call of one operator: what it is given, and how to make it."""

    op: str
    shape: tuple[int, ...]
    variant: str
    tensors: dict[str, Tensor]  # float64 or float32 values; those of `typed` are converted to the type under test
    typed: tuple[str, ...]
    call: Callable[[str, dict[str, Tensor]], tuple[Tensor, ...]]  # (kernel or reference, tensors) -> results
    constant: tuple[str, ...] = ("grad", "running_mean", "running_var")  # get no gradient


@dataclass(frozen=True)
class Row:
    """How far off one case was, in the result that came closest to (or furthest beyond) what is allowed."""

    op: str
    shape: tuple[int, ...]
    variant: str
    dtype: str
    result: str
    error: float
    allowed: float
    faults: str  # anything else that is wrong

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed and not self.faults


# What is called with what


def cases(shape: tuple[int, ...], device: str) -> Iterator[Case]:
    """Every operator on this shape [N, K, C, H, W], in several variants."""
    n, k, c, h, w = shape
    generator = torch.Generator(device).manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=device)

    y_NHWKC, residual_NCHW, out_grad_NCHW = normal(n, h, w, k, c), normal(n, c, h, w), normal(n, c, h, w)
    coef_NK = (0.5 + normal(n, k)).float()
    y_NKCHW = y_NHWKC.permute(0, 3, 4, 1, 2)
    last = residual_NCHW.contiguous(memory_format=torch.channels_last)
    maps = {"y": y_NKCHW, "coef": coef_NK, "grad": out_grad_NCHW.contiguous(memory_format=torch.channels_last)}
    plain = {"y": y_NKCHW.contiguous(), "coef": coef_NK, "grad": out_grad_NCHW, "residual": residual_NCHW}
    typed = ("x", "y", "residual", "grad", "w")
    variants = {"": maps, "gaps": maps, "residual": {**maps, "residual": last}, "NCHW": plain}
    for variant, tensors in variants.items():
        yield Case("weighted_sum", shape, variant, tensors, typed, call_weighted_sum)

    x_NCHW, copies_grad_NKCHW = normal(n, c, h, w), normal(n, h, w, k, c).permute(0, 3, 4, 1, 2)
    copied = {"x": x_NCHW.contiguous(memory_format=torch.channels_last), "coef": coef_NK, "grad": copies_grad_NKCHW}
    yield Case("scaled_copies", shape, "", copied, typed, call_scaled_copies)
    yield Case("scaled_copies", shape, "gaps", copied, typed, call_scaled_copies)
    copied = {"x": x_NCHW, "coef": coef_NK, "grad": copies_grad_NKCHW.contiguous()}
    yield Case("scaled_copies", shape, "NCHW", copied, typed, call_scaled_copies)

    # Means far from 0 and different for every channel, some of a deviation near 0.
    y_NKCHW = y_NKCHW * (0.1 + normal(1, k, c, 1, 1).abs()) + 4 * normal(1, k, c, 1, 1)
    yield Case("batch_statistics", shape, "", {"y": y_NKCHW}, typed, call_batch_statistics)
    yield Case("batch_statistics", shape, "gaps", {"y": y_NKCHW}, typed, call_batch_statistics)
    yield Case("batch_statistics", shape, "NCHW", {"y": y_NKCHW.contiguous()}, typed, call_batch_statistics)

    norm = {"weight": normal(k, c).float(), "bias": normal(k, c).float()}
    norm |= {"running_mean": normal(k, c).float(), "running_var": normal(k, c).float().square() + 0.1}
    maps, plain = maps | norm | {"y": y_NKCHW}, plain | norm | {"y": y_NKCHW.contiguous()}
    variants = {"eval": (maps, False), "gaps": (maps, False)}
    if n * h * w > 1:
        variants |= {"": (maps, True), "residual": ({**maps, "residual": last}, True), "NCHW": (plain, True)}
    for variant, (tensors, training) in variants.items():
        call = call_training if training else call_eval
        yield Case("bn_relu_weighted_sum", shape, variant, tensors, typed, call)

    norm = {name: tensor[0] for name, tensor in norm.items()}
    loops = device == "cpu" and not knobs.runtime.interpret
    if loops:  # elsewhere these are plain torch
        x_NCHW = y_NKCHW[:, 0]
        for variant, how in POOL_VARIANTS.items():
            pool, training = how.get("pool", False), how.get("training", True)
            if (pool and min(h, w) < 2) or (training and n * h * w < 2):
                continue
            size = (h // 2, w // 2) if pool else (h, w)
            grad_NCHW = normal(n, c, *size)
            lying = (lambda t: t) if variant == "NCHW" else (lambda t: t.contiguous(memory_format=torch.channels_last))
            given = {"x": lying(x_NCHW.contiguous()), "grad": lying(grad_NCHW)}
            call = partial(call_pool, how=how)
            yield Case("bn_relu_pool", shape, variant, given | ({} if "slope" in how else norm), typed, call)

        filters = min(c, 16) + 1
        x_NCHW, w_OCHW, grad_NOHW = normal(n, c, h, w), normal(filters, c, 3, 3), normal(n, filters, h, w)
        plain = {"x": x_NCHW, "w": w_OCHW, "grad": grad_NOHW}
        lying = {name: t.contiguous(memory_format=torch.channels_last) for name, t in plain.items()}
        yield Case("conv_matmul", shape, "", lying, typed, call_conv_matmul)
        yield Case("conv_matmul", shape, "gaps", lying, typed, call_conv_matmul)
        yield Case("conv_matmul", shape, "NCHW", plain, typed, call_conv_matmul)
        masters = lying | {"w": w_OCHW.float()}
        yield Case("conv_matmul", shape, "float32 filters", masters, ("x", "grad"), call_conv_matmul)
    yield from cases_of_rows(shape, normal, norm)
    if loops and math.prod(shape) <= BLOCKED_ELEMENTS:
        yield from cases_of_groups(shape, normal)
    if not loops:  # on a CPU it is plain torch
        yield from cases_of_bytes(shape, normal)

    side = min(h, 3)
    w_KOIHW = normal(k, c, min(c, 8) + 1, side, side)
    lying = w_KOIHW.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    filters = {"w": w_KOIHW, "coef": coef_NK, "grad": normal(n, *w_KOIHW.shape[1:])}
    yield Case("aggregate_weights", shape, "", filters, typed, call_aggregate_weights)
    yield Case("aggregate_weights", shape, "gaps", filters, typed, call_aggregate_weights)
    yield Case("aggregate_weights", shape, "channels-last", filters | {"w": lying}, typed, call_aggregate_weights)
    masters = filters | {"w": w_KOIHW.float()}
    yield Case("aggregate_weights", shape, "float32 filters", masters, ("grad",), call_aggregate_weights)


def cases_of_rows(shape: tuple[int, ...], normal: Callable[..., Tensor], norm: dict[str, Tensor]) -> Iterator[Case]:
    """`bn_gelu` with different numbers of axes before the channels; `norm` has what belongs to them."""
    n, _, c, h, w = shape
    x_NHWC, grad_NHWC = 4 * normal(c) + normal(c) * normal(n, h, w, c), normal(n, h, w, c)
    maps = {name: norm[name] for name in ("bias", "running_mean", "running_var")} | {"x": x_NHWC, "grad": grad_NHWC}
    rows = maps | {"x": x_NHWC.flatten(0, 2), "grad": grad_NHWC.flatten(0, 2)}
    groups = maps | {"x": x_NHWC[None], "grad": grad_NHWC[None]}
    variants = {"eval": maps, "eval, rows": rows}
    if n * h * w > 1:
        variants |= {"": maps, "gaps": maps, "rows": rows, "groups": groups}
    for variant, tensors in variants.items():
        call = partial(call_bn_gelu, training="eval" not in variant)
        yield Case("bn_gelu", shape, variant, tensors, ("x", "grad"), call)


def cases_of_groups(shape: tuple[int, ...], normal: Callable[..., Tensor]) -> Iterator[Case]:
    """What works on groups of 32 images, as many groups as the shape has samples, and multiples of 32 channels."""
    n, k, c, h, w = shape
    groups, channels, filters = min(n, 5), 32 * (1 + c % 3), 32 * (1 + k % 3)
    x_GHWMC, w_OCHW = normal(groups, h, w, 32, channels), normal(filters, channels, 3, 3)
    for pool in (False, True) if min(h, w) > 1 else (False,):
        size = (h // 2, w // 2) if pool else (h, w)
        given = {"x": x_GHWMC, "w": w_OCHW, "grad": normal(groups, *size, 32, filters)}
        call = partial(call_conv_blocked, pool=pool)
        masters = given | {"w": w_OCHW.float()}
        for variant, tensors in {"": given, "gaps": given, "float32 filters": masters}.items():
            typed = ("x", "grad") if tensors is masters else ("x", "w", "grad")
            name = ", ".join(filter(None, ("pool" if pool else "", variant)))
            yield Case("conv_blocked", shape, name, tensors, typed, call)

    if min(h, w) > 1:
        images, filters = 13 * groups, min(c, 32)
        plain = {"x": normal(images, 3, h, w), "w": normal(filters, 3, 2, 2), "bias": normal(filters).float()}
        plain |= {"grad": normal(images, h - 1, w - 1, 32)}
        lying = plain | {"x": plain["x"].contiguous(memory_format=torch.channels_last)}
        masters = lying | {"w": plain["w"].float()}
        for variant, tensors in {"": lying, "gaps": lying, "NCHW": plain, "float32 filters": masters}.items():
            typed = ("x", "grad") if tensors is masters else ("x", "w", "grad")
            yield Case("patches_gelu", shape, variant, tensors, typed, call_patches_gelu, ("x", "w", "grad"))


def cases_of_bytes(shape: tuple[int, ...], normal: Callable[..., Tensor]) -> Iterator[Case]:
    """`crop_flip` of N images, small ones enlarged: more than one program is to work on each."""
    n, _, _, h, w = shape
    height, width = (h, w) if h * w >= 256 else (h + 13, w + 14)
    shift_N2 = (normal(n, 2) * 10).round().long().clamp(1 - min(height, width), min(height, width) - 1)
    given = {
        "images": (128 + 60 * normal(n, height, width, 3)).clamp(0, 255).to(torch.uint8),
        "ids": (normal(n) * n).long() % n,
        "shift": shift_N2,
        "mirror": normal(n) > 0,
        "gain": normal(n, 3).float() / 64,
        "bias": normal(n, 3).float(),
        "like": normal(1),  # of the type that is asked for
    }
    for border in ("reflect", "black"):
        yield Case("crop_flip", shape, border, given, ("like",), partial(call_crop_flip, border=border), tuple(given))


def call_weighted_sum(which: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    function = {"kernel": weighted_sum, "reference": weighted_sum_reference}[which]
    return (function(tensors["y"], tensors["coef"], tensors.get("residual")),)


def call_scaled_copies(which: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    function = {"kernel": scaled_copies, "reference": scaled_copies_reference}[which]
    return (function(tensors["x"], tensors["coef"]),)


def call_batch_statistics(which: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    function = {"kernel": batch_statistics, "reference": batch_statistics_reference}[which]
    return function(tensors["y"].detach())


def call_training(which: str, tensors: dict[str, Tensor], training: bool = True) -> tuple[Tensor, ...]:
    function = {"kernel": bn_relu_weighted_sum, "reference": bn_relu_weighted_sum_reference}[which]
    running = tensors["running_mean"].clone(), tensors["running_var"].clone()
    norm = tensors["weight"], tensors["bias"], *running
    residual = tensors.get("residual")
    out = function(tensors["y"], tensors["coef"], *norm, residual_NCHW=residual, training=training)
    return out, *running


def call_eval(which: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return call_training(which, tensors, training=False)


def call_aggregate_weights(which: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    function = {"kernel": aggregate_weights, "reference": aggregate_weights_reference}[which]
    return (function(tensors["w"], tensors["coef"], tensors["grad"].dtype),)


def call_pool(which: str, tensors: dict[str, Tensor], how: dict) -> tuple[Tensor, ...]:
    running = [tensors[name].clone() for name in ("running_mean", "running_var") if name in tensors]
    norm = [tensors[name] for name in ("weight", "bias") if name in tensors]
    function = {"kernel": bn_relu_pool, "reference": bn_relu_pool_reference}[which]
    if not how.get("dropout"):
        return function(tensors["x"], *norm, *running, **how), *running
    torch.manual_seed(0)
    if which == "kernel":
        return function(tensors["x"], *norm, *running, **how), *running
    with dropping_the_same(tensors["x"], how["dropout"]):
        return function(tensors["x"], *norm, *running, **how), *running


def call_conv_matmul(which: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    function = {"kernel": conv_matmul, "reference": conv_matmul_reference}[which]
    return (function(tensors["x"], tensors["w"]),)


def call_bn_gelu(which: str, tensors: dict[str, Tensor], training: bool) -> tuple[Tensor, ...]:
    function = {"kernel": bn_gelu, "reference": bn_gelu_reference}[which]
    running = tensors["running_mean"].clone(), tensors["running_var"].clone()
    return function(tensors["x"], tensors["bias"], *running, training=training), *running


def call_crop_flip(which: str, tensors: dict[str, Tensor], border: Border) -> tuple[Tensor, ...]:
    function = {"kernel": crop_flip, "reference": crop_flip_reference}[which]
    *given, like = tensors.values()
    return (function(*given, border=border, dtype=like.dtype),)


def call_conv_blocked(which: str, tensors: dict[str, Tensor], pool: bool) -> tuple[Tensor, ...]:
    function = {"kernel": conv_blocked, "reference": conv_blocked_reference}[which]
    return (function(tensors["x"], tensors["w"], pool),)


def call_patches_gelu(which: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """As images [N, H - 1, W - 1, 32]: what fills the last group up may be anything but what was read from outside."""
    function = {"kernel": patches_gelu, "reference": patches_gelu_reference}[which]
    out_GHWMO = function(tensors["x"], tensors["w"], tensors["bias"])
    out_NHWO, fill_NHWO = out_GHWMO.transpose(2, 3).transpose(1, 2).flatten(0, 1).tensor_split([len(tensors["x"])])
    return (out_NHWO + 0 * fill_NHWO.sum(),)  # NaN if any of it is


@contextmanager
def dropping_the_same(x_NCHW: Tensor, dropout: float) -> Iterator[None]:
    """Inside, F.dropout drops what the operator would drop now of a tensor like `x_NCHW`: that is its own to choose."""
    ones_NCHW = torch.ones_like(x_NCHW, dtype=torch.float32, memory_format=torch.channels_last)
    kept_NCHW = bn_relu_pool(ones_NCHW.detach(), dropout=dropout)
    with mock.patch.object(F, "dropout", lambda x_NCHW, *_: x_NCHW * kept_NCHW.to(x_NCHW.dtype)):
        yield


# How it is judged


def judge(case: Case, dtype: torch.dtype) -> Row:
    """Run one case in one type: kernel twice, eager torch, and float64."""
    given = {name: tensor.to(dtype) if name in case.typed else tensor for name, tensor in case.tensors.items()}
    if case.op == "bn_relu_weighted_sum":
        given["grad"] = away_from_kinks(given, training=case.call is call_training)
    if case.op in ("bn_relu_pool", "conv_blocked"):
        given["grad"] = away_from_ties(case, given)
    faults = []
    with guarding() as guard:
        gap = 1 if "gaps" in case.variant else 0
        inside = {
            name: guard.copy(tensor, gap) if tensor.is_floating_point() else tensor.clone()  # no NaN to guard it with
            for name, tensor in given.items()
        }
        found = results(case, "kernel", inside)
        # The interpreter runs one program after the other: a second run could teach nothing.
        again = found if knobs.runtime.interpret else results(case, "kernel", inside)
    if not guard.untouched():
        faults.append("wrote outside its tensors")
    if any(not torch.equal(given[name], inside[name]) for name in given):
        faults.append("changed its input")
    if any(not torch.equal(found[name], again[name]) for name in found if not found[name].isnan().any()):
        faults.append("differs when run again")
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    truth = results(case, "reference", exact)
    shaken = [shaken_results(case, exact, dtype, seed) for seed in range(SHAKES)]
    # In both memory layouts, as plain torch rounds differently in each (on a CPU, batch_norm is more precise in NCHW).
    eager = [results(case, "reference", laid_out) for laid_out in (given, turned(given))]
    compared = []
    for name in truth:
        if found[name].dtype != eager[0][name].dtype:
            faults.append(f"{name} is {found[name].dtype}, should be {eager[0][name].dtype}")
        plain, noise = (max(distance(one[name], truth[name]) for one in some) for some in (eager, shaken))
        allowed = 2 * plain + 2 * noise + rounding(eager[0][name].dtype)
        if case.op == "conv_blocked" and is_transformed(case, given, name):
            allowed += TRANSFORMED * rounding(dtype) + TRANSFORMING * rounding(torch.float32)
        if not math.isfinite(allowed):
            faults.append(f"{name} cannot be judged: plain torch overflows")
        compared.append((name, distance(found[name], truth[name]), allowed))
    name, error, allowed = max(compared, key=lambda entry: math.inf if math.isnan(entry[1]) else entry[1] / entry[2])
    return Row(case.op, case.shape, case.variant, str(dtype)[6:], name, error, allowed, ", ".join(faults))


def results(case: Case, which: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that a call computes: its results, and the gradients of its floating arguments."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items() if name not in case.constant}
    outputs = case.call(which, given | leaves)
    names = {"batch_statistics": ("mean", "variance")}.get(case.op, ("out", "running_mean", "running_var"))
    found = dict(zip(names, outputs, strict=False))
    if "out" in found and leaves:
        grads = torch.autograd.grad(found["out"], list(leaves.values()), given["grad"].to(found["out"].dtype))
        found |= {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def is_transformed(case: Case, given: dict[str, Tensor], result: str) -> bool:
    """Whether what a convolution multiplies for this result is not given, but made of it, and rounded once more."""
    if amx.runs(given["x"]) and (result == "grad of w" or (result == "grad of x" and case.call.keywords["pool"])):
        return False
    return transforms(given["x"], given["w"])


def away_from_kinks(given: dict[str, Tensor], training: bool) -> Tensor:
    """The gradient coming in, 0 wherever an input of a ReLU is nearly 0: there any rounding may turn its slope over."""
    exact = {name: tensor.double()[..., None, None] for name, tensor in given.items() if name not in ("y", "grad")}
    y_NKCHW, mean_KC11, variance_KC11 = given["y"].double(), exact["running_mean"], exact["running_var"]
    if training:
        variance_KC11, mean_KC11 = torch.var_mean(y_NKCHW, dim=(0, 3, 4), correction=0, keepdim=True)
    a_NKCHW = (y_NKCHW - mean_KC11) / (variance_KC11 + 1e-5).sqrt() * exact["weight"] + exact["bias"]
    return given["grad"].where((a_NKCHW.abs() > 1e-4).all(dim=1), 0)


def away_from_ties(case: Case, given: dict[str, Tensor]) -> Tensor:
    """The gradient coming in, 0 wherever any rounding may make another element the largest, or turn a slope over."""
    exact = {name: tensor.double() for name, tensor in given.items()}
    if case.op == "conv_blocked":
        if not case.call.keywords["pool"]:
            return given["grad"]
        # Plain torch rounds what it pools to the type under test.
        y_GHWMO = conv_blocked_reference(exact["x"], exact["w"])
        gap_GMOHW = gaps(y_GHWMO.permute(0, 3, 4, 1, 2).flatten(0, 1)).unflatten(0, (len(y_GHWMO), -1))
        allowed = max(torch.finfo(given["x"].dtype).eps, 1e-4) * y_GHWMO.abs().max()
        allowed *= TRANSFORMED if is_transformed(case, given, "out") else 1
        return given["grad"].where(gap_GMOHW.permute(0, 3, 4, 1, 2) > allowed, 0)
    values: list[Tensor] = []

    def watch(x_NCHW: Tensor, *_rest) -> Tensor:
        values.append(x_NCHW)
        return leaky_relu(x_NCHW, *_rest)

    leaky_relu = F.leaky_relu
    with mock.patch.object(F, "leaky_relu", watch):
        out_NCHW = call_pool("reference", exact, case.call.keywords["how"] | {"pool": False})[0]
    far_NCHW = values[0].abs() > 1e-4
    if out_NCHW.shape != given["grad"].shape:
        far_NCHW = F.max_pool2d((~far_NCHW).double(), 2) == 0
        far_NCHW &= gaps(out_NCHW) > 1e-4
    return given["grad"].where(far_NCHW, 0)


def gaps(x_NCHW: Tensor) -> Tensor:
    """By how much the largest of each 2 x 2 pixels is larger than the second."""
    windows_NCHW4 = x_NCHW.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    return -windows_NCHW4.topk(2).values.diff()[..., 0]


def turned(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the other memory layout: channels-last if they are contiguous, else contiguous."""
    last = {5: (0, 3, 4, 1, 2), 4: (0, 2, 3, 1)}
    back = {5: (0, 3, 4, 1, 2), 4: (0, 3, 1, 2)}
    return {
        name: t.permute(last[t.dim()]).contiguous().permute(back[t.dim()])
        if t.dim() in last and t.is_contiguous()
        else t.contiguous()
        for name, t in given.items()
    }


def distance(found: Tensor, truth: Tensor) -> float:
    """The largest error, relative to the largest value."""
    return float((found.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


def shaken_results(case: Case, exact: dict[str, Tensor], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The truth where every argument is off by a rounding, and, in the loops, GELU by what its polynomials are.

    The loops of `bn_gelu` store GELU's gradient between two passes, so that is off by a rounding, too.
    """
    if runs_triton(next(iter(exact.values()))):
        return results(case, "reference", shake(exact, seed))
    stored = rounding(dtype) if case.op == "bn_gelu" else 0.0
    with mock.patch.object(F, "gelu", lambda u: GeluOff.apply(u, seed, stored)):
        return results(case, "reference", shake(exact, seed))


def shake(exact: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every value up or down by one float32 rounding."""
    device, half_ulp = next(iter(exact.values())).device, torch.finfo(torch.float32).eps / 2
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randint, 0, 2, generator=generator, device=device)
    signs = {name: draw(t.shape) * 2 - 1 for name, t in exact.items()}
    return {
        name: tensor * (1 + half_ulp * signs[name]) if tensor.is_floating_point() else tensor
        for name, tensor in exact.items()
    }


class GeluOff(torch.autograd.Function):
    """GELU where every value and slope is off, up or down, by as much as `bn_gelu` allows itself."""

    @staticmethod
    def forward(ctx, u: Tensor, seed: int, rounding: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, u.shape, generator=generator).to(u.device) * 2 - 1
        ctx.save_for_backward(u, signs)
        ctx.rounding = rounding
        return u * (torch.special.ndtr(u) + PHI_OFF * signs)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        u, signs = ctx.saved_tensors
        density = (-u.square() / 2).exp() / math.sqrt(2 * math.pi)
        slope = torch.special.ndtr(u) + u * density + SLOPE_OFF * signs
        return grads[0] * slope * (1 + ctx.rounding * signs), None, None


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of storing a float32 as this type."""
    # Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds to nearest: that costs up to twice as much.
    cut_off = knobs.runtime.interpret and dtype == torch.bfloat16
    return torch.finfo(dtype).eps / (1 if cut_off else 2)


# All of it


def verify(device: str, shapes: tuple[tuple[int, ...], ...], ops: list[str] | None) -> Iterator[Row]:
    """Every case of these shapes; plain ones also with few programs, so that each walks several pieces and tiles."""
    for shape in shapes:
        for case in cases(shape, device):
            if ops and case.op not in ops:
                continue
            # One type is enough for gaps; but each may have loops of its own, and of float16 once is enough for those.
            few = (torch.float32, torch.bfloat16) if case.op in OF_BLOCKS else (torch.float32,)
            once = "gaps" in case.variant or (case.op in OF_BLOCKS and case.variant)
            for dtype in few if once else DTYPES:
                yield judge(case, dtype)
            if case.variant in ("", "pool"):
                for programs in (2, 3 * shape[1] * -(-shape[2] // 128)):  # for all, or for every expert and channel
                    with few_programs(programs):
                        name = ", ".join(filter(None, (case.variant, f"{programs} programs")))
                        yield from (replace(judge(case, dtype), variant=name) for dtype in few)


@contextmanager
def few_programs(programs: int) -> Iterator[None]:
    """Cut the work as if a GPU were full with so many, and merge what they leave two by two."""
    least = 0 if programs == 2 else math.inf
    with (
        mock.patch.object(tiles, "PROGRAMS", programs),
        mock.patch.object(aggregation, "PROGRAMS", programs),
        mock.patch.object(statistics, "MERGED_AT_ONCE", 2),
        mock.patch.object(products, "ROWS_BYTES", 2**12),  # few images at a time
        mock.patch.object(banded, "BAND_BYTES", 1),  # two rows at a time
        mock.patch.multiple(tiled, BAND_BYTES=1, LONG_BAND_BYTES=1),  # one tile at a time,
        mock.patch.object(tiled, "MANY_SUMS_BYTES", least),  # by all threads, or by one
        mock.patch.multiple(blocked, TRANSFORMED_FILTERS=least, TRANSFORMED_PIXELS=least),  # on AMX all, or none
    ):
        yield


def report(title: str, rows: Iterator[Row]) -> bool:
    """Print a table as the rows come; returns whether all passed."""
    line = "{:22} {:22} {:9} {:32} {:20} {:>9} {:>9}  {}"
    print(title)
    print(line.format("operator", "N, K, C, H, W", "dtype", "variant", "worst result", "error", "allowed", ""))
    count = missed = 0
    for row in rows:
        count, missed = count + 1, missed + (not row.passed)
        verdict = "ok" if row.passed else f"MISS {row.faults}"
        where = row.op, ", ".join(map(str, row.shape)), row.dtype, row.variant, row.result
        print(line.format(*where, f"{row.error:.2e}", f"{row.allowed:.2e}", verdict), flush=True)
    print(
        f"{title} {count - missed} of {count} passed." if count else "Nothing to verify: plain torch here.", flush=True
    )
    return not missed


def main(words: list[str] | None = None) -> int:
    """Verify everything that this machine can run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=[*OPERATORS, *OF_THE_CPU], help="only these operators")
    ops = parser.parse_args(words).op
    if knobs.runtime.interpret:
        return not report("Triton kernels in Triton's interpreter, small shapes:", verify("cpu", SMALL, ops))
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        title = f"Triton kernels on {gpu.name}, sm_{gpu.major}{gpu.minor}:"
        return not report(title, verify("cuda", LARGE, ops))
    bits = {dtype: f"{str(dtype)[6:]} in vectors of {lanes}" for dtype, lanes in vectors.LANES.items()}
    bits |= {torch.bfloat16: "bfloat16 with AMX"} if amx.available() else {}
    how = f"{', '.join(OF_BLOCKS)}: {', '.join(bits.values()) or 'plain torch'}"
    passed = report(f"numba loops for CPU tensors ({how}):", verify("cpu", MEDIUM, ops))
    if ops and not {*ops} - {*OF_THE_CPU}:
        return not passed
    command = [sys.executable, "-m", "fastcifar_kernels.verify", *(["--op", *ops] if ops else [])]
    interpreted = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False)
    return not (passed and interpreted.returncode == 0)


if __name__ == "__main__":
    sys.exit(main())
