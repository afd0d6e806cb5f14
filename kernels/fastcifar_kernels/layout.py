"""How tensors lie in memory for the kernels, and the checks that every public function makes first.

The kernels see experts as [N, P, K, C] with contiguous channels: exactly what one channels-last convolution with K * C
filters writes. Whatever lies otherwise is copied into that order.
"""

import torch
from torch import Tensor
from triton import knobs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements that a sample may span: inside a sample the kernels count in 32 bits, between samples in 64. A tile may begin
# inside and end beyond, so it takes a little less than 2**31.
SPAN_LIMIT = 2**31 - 2**16
GROUP = 32  # images that lie side by side at every pixel of blocked ones
BLOCK_CHANNELS = 32  # of which blocked images have a multiple


def runs_triton(tensor: Tensor) -> bool:
    """Whether this tensor takes the Triton kernels (interpreted for a CPU tensor) rather than the numba loops."""
    return tensor.device.type != "cpu" or knobs.runtime.interpret


def computes_in_float32(tensor: Tensor) -> bool:
    """Whether this is a float16 CPU tensor, which is converted: neither numba nor most CPUs compute in that type."""
    return tensor.dtype == torch.float16 and not runs_triton(tensor)


def as_rows(y_NKCHW: Tensor) -> Tensor:
    """[N, P, K, C] with contiguous channels: a view of channels-last experts, a copy of any other layout."""
    y_NPKC = y_NKCHW.permute(0, 3, 4, 1, 2).flatten(1, 2)
    return y_NPKC if y_NPKC.stride(3) == 1 else y_NPKC.contiguous()


def as_pixels(x_NCHW: Tensor) -> Tensor:
    """[N, P, C], contiguous: a view of a channels-last tensor, a copy of any other layout."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def empty_experts(y_NKCHW: Tensor) -> Tensor:
    """An unwritten tensor of the shape of `y_NKCHW` in the order that `as_rows` gives without a copy."""
    n, k, c, h, w = y_NKCHW.shape
    return torch.empty((n, h, w, k, c), dtype=y_NKCHW.dtype, device=y_NKCHW.device).permute(0, 3, 4, 1, 2)


def empty_map(y_NKCHW: Tensor) -> Tensor:
    """An unwritten channels-last [N, C, H, W] of the type and device of `y_NKCHW`."""
    n, _, c, h, w = y_NKCHW.shape
    return torch.empty((n, h, w, c), dtype=y_NKCHW.dtype, device=y_NKCHW.device).permute(0, 3, 1, 2)


# Checks


def check_experts(y_NKCHW: Tensor, coef_NK: Tensor, residual_NCHW: Tensor | None) -> None:
    """Raise ValueError, naming the argument and both shapes, unless the three belong together."""
    check_values("y_NKCHW", y_NKCHW, 5)
    check_stack("y_NKCHW", y_NKCHW, y_NKCHW.size(1))
    n, k, c, h, w = y_NKCHW.shape
    check_companion("coef_NK", coef_NK, (n, k), "y_NKCHW", y_NKCHW)
    if residual_NCHW is not None:
        check_companion("residual_NCHW", residual_NCHW, (n, c, h, w), "y_NKCHW", y_NKCHW)
        if residual_NCHW.dtype != y_NKCHW.dtype:
            raise ValueError(
                f"residual_NCHW is {residual_NCHW.dtype}, y_NKCHW is {y_NKCHW.dtype}: convert one of them."
            )


def check_values(name: str, tensor: Tensor, dims: int) -> None:
    """Raise ValueError unless this is a tensor of `dims` dimensions in a type that the kernels compute with."""
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, has shape {tuple(tensor.shape)}.")
    check_dtype(name, tensor.dtype)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the kernels compute with this type."""
    if dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, is {dtype}.")


def check_companion(name: str, tensor: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor) -> None:
    """Raise ValueError unless `tensor` has this shape, which `other` asks for, is floating and lies beside `other`."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape} beside {other_name} of shape {tuple(other.shape)}, "
            f"has {tuple(tensor.shape)}."
        )
    check_dtype(name, tensor.dtype)
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} is on {other.device}: move one of them.")


def check_stack(name: str, tensor: Tensor, experts: int) -> None:
    """Raise ValueError if there is no expert, or if a single sample spans more elements than 32 bits count."""
    if not experts:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} has no expert.")
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    span = max(reach, tensor[:1].numel())
    if span >= SPAN_LIMIT:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} spans {span:,} elements a sample: 2**31 are too many.")
