"""A dynamic convolution block beside the k-loop it replaces, and its three forms beside each other.

    python bench/dynamic_block.py > bench/records/DATE-dynamic-block/result.json

Forward and backward in turn, bfloat16, channels-last; medians. Before anything is timed, block and k-loop must agree:
the block may be at most twice as far from float64 as the k-loop is.
"""

import copy
import json
import statistics

from fastcifar.process import set_threads, tune_allocator

tune_allocator()
threads = set_threads()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from fastcifar.models.dynamic import DynamicConv2d, now_s, time_forms  # noqa: E402
from fastcifar.process import processor  # noqa: E402
from fastcifar.run import source_commit  # noqa: E402

ROUNDS, WARM_UP, GATE_IMAGES = 15, 3, 32

# N images, C channels in, O out, side in pixels, K experts
SHAPES = (
    (512, 64, 128, 16, 4),
    (512, 16, 64, 32, 4),
    (128, 256, 512, 8, 4),
    (512, 64, 64, 16, 2),
    (128, 64, 128, 16, 8),
)
FORM_SHAPES = (*SHAPES, (1, 64, 128, 32, 4), (8, 64, 128, 16, 4), (512, 128, 32, 16, 4))


class KLoop(nn.Module):
    """What one writes first: k convolutions, each with BatchNorm and ReLU, added up one after the other."""

    def __init__(self, block: DynamicConv2d):
        super().__init__()
        self.gate = block.gate
        (experts, channels_out), conv, norm = block.split, block.conv, block.norm
        assert norm is not None
        how = {"padding": conv.padding, "bias": False}
        self.convs = nn.ModuleList(nn.Conv2d(conv.in_channels, channels_out, 3, **how) for _ in range(experts))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels_out) for _ in range(experts))
        for k in range(experts):
            part = slice(k * channels_out, (k + 1) * channels_out)
            self.convs[k].load_state_dict({"weight": conv.weight[part]})
            self.norms[k].load_state_dict({"weight": norm.weight[part], "bias": norm.bias[part]}, strict=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        coef_NK = self.gate(x_NCHW)
        out = torch.zeros((), dtype=x_NCHW.dtype, device=x_NCHW.device)
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = out + coef_NK[:, k, None, None, None] * F.relu(norm(conv(x_NCHW)))
        return out


def make(shape: tuple[int, ...], device: str, norm: bool) -> tuple[DynamicConv2d, Tensor]:
    """A block with BatchNorm weights that are not all 1 and 0, and a batch for it."""
    n, c, o, side, k = shape
    block = DynamicConv2d(c, o, k, norm=norm)
    if block.norm is not None:
        nn.init.uniform_(block.norm.weight, 0.5, 1.5)
        nn.init.normal_(block.norm.bias)
    x_NCHW = torch.randn(n, c, side, side).to(torch.bfloat16)
    block.gate.to(torch.bfloat16)
    block.conv.to(torch.bfloat16)
    block = block.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return block, x_NCHW.to(device, memory_format=torch.channels_last)


def gate(block: DynamicConv2d, x_NCHW: Tensor) -> None:
    """Raise ArithmeticError unless the block is as close to float64 as the k-loop, within a factor of 2."""
    grad_NOHW = torch.randn_like(k_loop(block)(x_NCHW))

    def results(module: nn.Module, x_NCHW: Tensor) -> list[Tensor]:
        x_NCHW = x_NCHW.detach().requires_grad_()
        out_NOHW = module(x_NCHW)
        (grad_NCHW,) = torch.autograd.grad(out_NOHW, x_NCHW, grad_NOHW.to(out_NOHW.dtype))
        return [out_NOHW.detach(), grad_NCHW]

    truth = results(copy.deepcopy(KLoop(block)).double(), x_NCHW.double())
    for ours, naive, exact in zip(results(block, x_NCHW), results(k_loop(block), x_NCHW), truth, strict=True):
        error, allowed = (float((one - exact).abs().max()) for one in (ours, naive))
        if not error <= 2 * allowed:
            raise ArithmeticError(f"the block is off by {error:.3g}, the k-loop by {allowed:.3g}")


def k_loop(block: DynamicConv2d) -> KLoop:
    """The k-loop with the block's weights, in the block's types."""
    loop = KLoop(block).to(block.conv.weight.device)
    loop = loop.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loop.convs.to(torch.bfloat16)
    return loop


def time_both(block: DynamicConv2d, x_NCHW: Tensor) -> dict[str, float]:
    """Median seconds of forward and backward."""
    modules = {"block": block, "k_loop": k_loop(block)}
    x_NCHW.requires_grad_()
    times_s: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(WARM_UP + ROUNDS):
        for name, module in modules.items():
            leaves = [x_NCHW, *module.parameters()]
            began_s = now_s(x_NCHW.device)
            out_NOHW = module(x_NCHW)
            torch.autograd.grad(out_NOHW, leaves, torch.ones_like(out_NOHW))
            times_s[name].append(now_s(x_NCHW.device) - began_s)
    return {name: statistics.median(times[WARM_UP:]) for name, times in times_s.items()}


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks, forms = [], []
    for shape in SHAPES:
        block, x_NCHW = make(shape, device, norm=True)
        gate(block, x_NCHW[:GATE_IMAGES])
        times_s = time_both(block, x_NCHW)
        blocks.append({"shape_NCOSK": shape, **times_s, "gain": times_s["k_loop"] / times_s["block"]})
    for shape in FORM_SHAPES:
        block, x_NCHW = make(shape, device, norm=False)
        coef_NK = block.gate(x_NCHW)
        directions = {"forward": False, "forward_backward": True}
        forms.append({"shape_NCOSK": shape} | {d: time_forms(block, x_NCHW, coef_NK, b) for d, b in directions.items()})
    report = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {threads} threads",
        "torch": torch.__version__,
        "commit": source_commit(),
        "dtype": "bfloat16",
        "with_batchnorm_and_relu_s": blocks,
        "forms_s": forms,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
