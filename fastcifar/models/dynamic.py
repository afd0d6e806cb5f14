"""Dynamic convolution: k parallel convolutions of one input, combined with coefficients that the input itself chooses.

CondConv (arXiv:1904.04971) and dynamic convolution (arXiv:1912.03458) combine the filters; with BatchNorm and ReLU on
each convolution, as here on request, only the outputs can be combined.

Shapes: N images, C channels in, O channels out, K experts (the parallel convolutions), H rows, W columns.
"""

import statistics
import time
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.models.conv import Conv2d, compute_dtype
from fastcifar.models.global_norm import GlobalBatchNorm
from fastcifar_kernels import aggregate_weights, bn_relu_weighted_sum, scaled_copies, weighted_sum

Squash = Literal["softmax", "sigmoid", "raw"]
Form = Literal["outputs", "weights", "inputs"]
FORMS: tuple[Form, ...] = get_args(Form)


class Gate(nn.Module):
    """The mean of each channel -> linear layers -> K coefficients.

    Args:
        hidden: width of a first linear layer with ReLU; 0 for a single layer.
        squash: softmax (they sum to 1), sigmoid (each between 0 and 1), or raw.
        temperature: divides the logits of a softmax; higher is more even.
    """

    def __init__(self, channels: int, experts: int, hidden: int = 0, squash: Squash = "softmax", temperature=1.0):
        super().__init__()
        first = [nn.Linear(channels, hidden), nn.ReLU()] if hidden else []
        self.layers = nn.Sequential(*first, nn.Linear(hidden or channels, experts))
        self.squash, self.temperature = squash, temperature

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NK = self.layers(x_NCHW.mean(dim=(2, 3)))
        if self.squash == "softmax":
            return (logits_NK / self.temperature).softmax(dim=1)
        return logits_NK.sigmoid() if self.squash == "sigmoid" else logits_NK


class DynamicConv2d(nn.Module):
    """[N, C, H, W] to [N, O, H', W'], channels-last: the sum over k of coef[n, k] * conv_k(x), one convolution in all.

    Without BatchNorm the sum can be taken in three places that give the same result:
        outputs: one convolution with K * O filters, then the weighted sum of its outputs;
        weights: filters of each image's own, the weighted sum of the K sets, in a convolution grouped by image;
        inputs:  one convolution over K scaled copies of the input, its own accumulators taking the sum.

    Args:
        norm: BatchNorm and ReLU on each expert's output before the sum, which then is of outputs.
        residual: add the input, through a 1x1 convolution and BatchNorm where its shape differs from the output's.
        form: where to take the sum; "auto" times the three once for every shape it meets, forward and backward, and
            keeps the fastest. Choosing by time, it may choose differently the next time, within rounding of the result.
            Inside torch.compile it takes what it last chose outside.
        hidden, squash, temperature: of the coefficients (see Gate).

    Raises:
        ValueError: a form that does not exist, or one that norm rules out.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        experts: int = 4,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        norm: bool = False,
        residual: bool = False,
        form: Form | Literal["auto"] = "auto",
        hidden: int = 0,
        squash: Squash = "softmax",
        temperature: float = 1.0,
    ):
        super().__init__()
        if form not in (*FORMS, "auto"):
            raise ValueError(f"form must be one of {', '.join(FORMS)} or auto, is {form!r}.")
        if norm and form not in ("outputs", "auto"):
            raise ValueError(f"form={form!r} does not go with norm=True: a ReLU before the sum leaves only 'outputs'.")
        self.split = (experts, channels_out)
        self.form: Form | Literal["auto"] = form
        self.chosen: Form = "outputs"
        self.gate = Gate(channels_in, experts, hidden, squash, temperature)
        filters = experts * channels_out
        self.conv = Conv2d(channels_in, filters, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(filters) if norm else None
        self.shortcut: nn.Module | None = None
        if residual and channels_in == channels_out and stride == 1:
            self.shortcut = nn.Identity()
        elif residual:
            pointwise = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(pointwise, nn.BatchNorm2d(channels_out))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = x_NCHW.to(compute_dtype(x_NCHW))
        coef_NK = self.gate(x_NCHW)
        residual_NOHW = None if self.shortcut is None else self.shortcut(x_NCHW)
        if self.norm is not None:
            return self.normalise_and_sum(self.norm, self.conv(x_NCHW), coef_NK, residual_NOHW)
        if self.form == "auto" and not torch.compiler.is_compiling():
            self.chosen = fastest_form(self, x_NCHW, coef_NK)
        form = self.chosen if self.form == "auto" else self.form
        return self.combine(form, x_NCHW, coef_NK, residual_NOHW)

    def normalise_and_sum(
        self, norm: nn.BatchNorm2d | GlobalBatchNorm, y_NCHW: Tensor, coef_NK: Tensor, residual_NOHW: Tensor | None
    ) -> Tensor:
        if isinstance(norm, GlobalBatchNorm):
            return weighted_sum(F.relu(norm(y_NCHW)).unflatten(1, self.split), coef_NK, residual_NOHW)
        names = "weight", "bias", "running_mean", "running_var"
        return bn_relu_weighted_sum(
            y_NCHW.unflatten(1, self.split),
            coef_NK,
            *(getattr(norm, name).view(self.split) for name in names),
            residual_NCHW=residual_NOHW,
            training=norm.training,
            momentum=norm.momentum or 0.0,
            eps=norm.eps,
        )

    def combine(self, form: Form, x_NCHW: Tensor, coef_NK: Tensor, residual_NOHW: Tensor | None) -> Tensor:
        """The weighted sum, taken where `form` says."""
        if form == "outputs":
            return weighted_sum(self.conv(x_NCHW).unflatten(1, self.split), coef_NK, residual_NOHW)
        n, c, h, w = x_NCHW.shape
        w_KOCHW = self.conv.weight.unflatten(0, self.split)
        how = {"stride": self.conv.stride, "padding": self.conv.padding}
        if form == "weights":
            own_NOCHW = aggregate_weights(w_KOCHW, coef_NK, x_NCHW.dtype)
            out_1NHW = F.conv2d(x_NCHW.reshape(1, n * c, h, w), own_NOCHW.flatten(0, 1), groups=n, **how)
            out_NOHW = out_1NHW.view(n, -1, *out_1NHW.shape[2:]).contiguous(memory_format=torch.channels_last)
        else:
            w_OKCHW = w_KOCHW.transpose(0, 1).flatten(1, 2)
            out_NOHW = F.conv2d(scaled_copies(x_NCHW, coef_NK).flatten(1, 2), w_OKCHW, **how)
        return out_NOHW if residual_NOHW is None else out_NOHW + residual_NOHW


# The choice by measurement

ROUNDS = 5
_fastest: dict[tuple, Form] = {}


def fastest_form(block: DynamicConv2d, x_NCHW: Tensor, coef_NK: Tensor) -> Form:
    """The form that takes least time for this shape on this device; measured the first time only."""
    backward = torch.is_grad_enabled()
    key = (x_NCHW.device, x_NCHW.dtype, x_NCHW.shape, block.split, block.conv.kernel_size, block.conv.stride, backward)
    if key not in _fastest:
        times_s = time_forms(block, x_NCHW, coef_NK, backward)
        _fastest[key] = min(times_s, key=lambda form: times_s[form])
    return _fastest[key]


def time_forms(block: DynamicConv2d, x_NCHW: Tensor, coef_NK: Tensor, backward: bool) -> dict[Form, float]:
    """Median seconds of each form, in turn, after one round to warm up. Gradients of parameters stay as they are."""
    leaves = [tensor.detach().requires_grad_(backward) for tensor in (x_NCHW, coef_NK)]
    times_s: dict[Form, list[float]] = {form: [] for form in FORMS}
    for _ in range(1 + ROUNDS):
        for form in FORMS:
            began_s = now_s(x_NCHW.device)
            out_NOHW = block.combine(form, leaves[0], leaves[1], None)
            if backward:
                torch.autograd.grad(out_NOHW, (*leaves, block.conv.weight), torch.ones_like(out_NOHW))
            times_s[form].append(now_s(x_NCHW.device) - began_s)
    return {form: statistics.median(times[1:]) for form, times in times_s.items()}


def now_s(device: torch.device) -> float:
    """The clock, once everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
