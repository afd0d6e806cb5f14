"""A GPU where there is none, for all that is Python: its tensors lie in the CPU's memory, and whatever would fail on a
GPU for where a tensor is, or for waiting while a graph is recorded, fails.

What an operator computes is what the CPU's computes: Triton's kernels have tests of their own. A tensor says to Python
that it is on cuda:0, and to torch's C++, which could not do without a driver, that it is on the CPU.
"""

import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import ClassVar
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastcifar import evaluate, graphs
from fastcifar.errors import UsageError

with suppress(UsageError):  # not installed
    importlib.import_module("fastcifar.loaders.ffcv")  # FFCV asks only then whether there is a GPU

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
# A GPU lets the CPU's indices and values in here; what comes out is where the first tensor is.
READ_BOTH = {aten.copy_, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# The program waits for the GPU to know a number, or how many there are.
WAIT = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}


class OnGpu(Tensor):
    """A tensor that says it is on a GPU; `held` has the numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device, is_cuda, is_cpu = GPU, True, False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.size(), **layout)  # type: ignore[attr-defined]

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"OnGpu({self.held})"

    def __tensor_flatten__(self):  # by which Module.to knows that it cannot write its memory into a parameter's
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return OnGpu(inner["held"])

    def numpy(self, *, force=False):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self):
        State.wait("tolist")
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


class State:
    """Of the one imitated GPU."""

    waits = 0  # how often the program waited for it, so far
    recording = False  # a graph, while nothing may wait
    inside = False  # what C++ makes out of nothing for the operator it is at, is on the GPU
    leaves = False  # what is copied now is to be on the CPU
    pinned: ClassVar = weakref.WeakSet()  # on the CPU, where the GPU can fetch it by itself

    @classmethod
    def wait(cls, for_what) -> None:
        if cls.recording:
            raise RuntimeError(f"{for_what}: operation not permitted when stream is capturing")
        cls.waits += 1


def call(function, args, kwargs):
    """One operator, of the GPU if a tensor there takes part or it is asked to make one."""
    packet, device = function.overloadpacket, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
    if packet in READ_BOTH:
        to_gpu = isinstance(args[0], OnGpu)
        if on_gpu and on_cpu:
            if not to_gpu and packet is not aten.copy_:
                raise RuntimeError(f"{function}: indices should be on the CPU, as the tensor is; they are on {GPU}.")
            State.wait(function)  # a copy from memory that is not pinned, or to the CPU
        if packet is not aten.copy_ and on_gpu and any(tensor.dtype == torch.bool for tensor in tensors[1:]):
            State.wait(function)
    else:
        if on_gpu and any(tensor.dim() for tensor in on_cpu):
            shapes = [tuple(tensor.shape) for tensor in on_cpu]
            raise RuntimeError(f"{function}: expected all tensors to be on {GPU}, of shapes {shapes} are on the CPU.")
        if on_gpu and packet in WAIT:
            State.wait(function)
        asked = device is not None and torch.device(device).type == "cuda"
        # A gradient's formula asks for the device that C++ knows: the CPU.
        inside = not tensors and (State.inside or torch._C._current_graph_task_id() != -1)
        to_gpu = asked or inside or (bool(on_gpu) and not State.leaves)
    if device is not None:
        kwargs = kwargs | {"device": CPU}
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    changed = {id(tensor.held): tensor for tensor in on_gpu}
    args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, OnGpu) else leaf, (args, kwargs))

    def placed(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        return changed[id(leaf)] if id(leaf) in changed else OnGpu(leaf) if to_gpu else leaf

    return tree_map(placed, function(*args, **kwargs))


class Operators(TorchDispatchMode):
    """Those without a tensor on the GPU among their arguments, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


class Moves(TorchFunctionMode):
    """What Python says of devices, before C++, for which all are one, would see nothing to do."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (Tensor.cpu, Tensor.cuda):
            return move(args[0], CPU if function is Tensor.cpu else GPU)
        if function is Tensor.pin_memory:
            pinned = args[0].clone()
            State.pinned.add(pinned)
            return pinned
        if function is Tensor.to:
            like = next((word for word in args[1:] if isinstance(word, Tensor)), None)
            words = args[1:] if like is None else (like.device, like.dtype)
            device, dtype, _, layout = torch._C._nn._parse_to(*words, **kwargs)  # type: ignore[attr-defined]
            if device is not None:
                return move(args[0], device, dtype, layout)
        device = torch.device(kwargs.get("device") or CPU)
        if device.type == "cuda" and function in (torch.tensor, torch.as_tensor):
            return move(function(*args, **kwargs | {"device": CPU}), device)
        if device.type == "cuda":  # cuda:0 is cuda: without a number C++ asks the driver for one
            kwargs = kwargs | {"device": GPU}
        inside = any(isinstance(leaf, OnGpu) for leaf in tree_leaves((args, kwargs)))
        with mock.patch.object(State, "inside", inside):
            return function(*args, **kwargs)


def move(tensor: Tensor, device: torch.device, dtype=None, layout=None) -> Tensor:
    to_gpu, dtype = device.type == "cuda", dtype or tensor.dtype
    moves = isinstance(tensor, OnGpu) != to_gpu
    if not moves and dtype == tensor.dtype and layout is None:
        return tensor
    straight = dtype == tensor.dtype and layout is None  # otherwise the CPU first makes a copy that is not pinned
    if moves and not (to_gpu and straight and any(tensor is pinned for pinned in State.pinned)):
        State.wait(f"a copy to {device}")
    options = {"dtype": dtype, "memory_format": layout}
    with mock.patch.object(State, "leaves", not to_gpu):
        return aten._to_copy.default(tensor, device=GPU if to_gpu else CPU, **options)


Outputs = tuple[Tensor, ...]


def record(work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """In place of `graphs.record`: nothing may wait then, and a replay leaves its results in the same tensors."""
    for _ in range(graphs.WARM_UPS):
        work()

    def checked() -> Outputs:
        with mock.patch.object(State, "recording", True):
            return work()

    outputs = checked()

    def replay() -> None:
        for output, value in zip(outputs, checked(), strict=True):
            output.copy_(value)

    return replay, outputs


DRIVER = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "get_device_name": lambda device=None: "an imitated GPU",
    "max_memory_allocated": lambda device=None: 1 << 30,
    "memory_reserved": lambda device=None: 1 << 30,
    "mem_get_info": lambda device=None: (1 << 32, 1 << 33),
    "reset_peak_memory_stats": lambda device=None: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "get_rng_state_all": lambda: [torch.get_rng_state()],
    "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
}


@contextmanager
def imitated_gpu() -> Iterator[type[State]]:
    """Inside, this machine has a GPU, cuda:0."""
    autocast, save, group = torch.autocast, safetensors.torch.save, torch._C._group_tensors_by_device_and_dtype

    def group_by_python(lists, *rest):
        groups = group(lists, *rest).items()
        return {(alike[0][0].device, dtype): (alike, at) for (_, dtype), (alike, at) in groups}  # type: ignore[union-attr]

    def save_held(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
        return save({name: move(tensor, CPU) for name, tensor in tensors.items()}, metadata)

    with ExitStack() as stack:
        enter, patch = stack.enter_context, mock.patch.object
        enter(mock.patch.multiple(torch.cuda, **DRIVER))
        enter(patch(torch, "autocast", lambda device, *rest, **more: autocast("cpu", *rest, **more)))
        enter(patch(safetensors.torch, "save", save_held))  # it looks at memory
        enter(patch(torch, "compile", lambda model=None, **options: model))
        enter(patch(torch._C, "_group_tensors_by_device_and_dtype", group_by_python))
        enter(patch(graphs, "record", record))
        # C++ refuses a tensor of Python's where gradients will never be asked for.
        enter(patch(torch, "inference_mode", torch.no_grad))
        enter(patch(evaluate, "answer", torch.no_grad()(evaluate.answer.__wrapped__)))
        # torch.tensor makes its numbers on the CPU first, where no mode sees it, and moves them where one does.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        enter(Operators())
        enter(Moves())
        yield State
