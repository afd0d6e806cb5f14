"""`fastcifar doctor`: what this machine has and what of it works, found out by trying."""

import platform
import tempfile
from pathlib import Path

import numba
import torch

from fastcifar import __version__, process
from fastcifar.data import shapes10
from fastcifar.data.download import import_torchvision
from fastcifar.data.pack import FORMATS, write_pack
from fastcifar.errors import UserError
from fastcifar.loaders import augment
from fastcifar.loaders.feed import LOADERS, Feed, import_loader
from fastcifar.loaders.loader import Loader
from fastcifar.result import installed
from fastcifar.run import source_commit
from fastcifar.settings import Augment
from fastcifar_kernels import amx, vectors

PACKAGES = ("torch", "torchvision", "triton", "numba", "numpy", "matplotlib", "jsonargparse", "safetensors")


def examine() -> list[tuple[str, str]]:
    """(what, how it is) for each thing a training depends on."""
    versions = ", ".join(f"{name} {installed(name) or 'not installed'}" for name in PACKAGES)
    return [
        ("fastcifar", f"{__version__}, commit {source_commit() or 'unknown (not a git checkout)'}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("packages", versions),
        ("processor", f"{process.processor()}, {process.physical_cores()} physical cores for this process"),
        ("instructions", cpu_capability()),
        ("threads", f"torch {torch.get_num_threads()}, numba {numba.get_num_threads()}"),
        ("allocator", describe_allocator()),
        *describe_gpus(),
        *try_loaders(),
        ("download", try_torchvision()),
        ("parquet files", "can be read" if installed("pyarrow") else "cannot be read without pyarrow: make dev"),
        ("triton kernels", try_triton()),
    ]


def cpu_capability() -> str:
    """What torch's own kernels use, whether there is a matrix unit, and what our convolutions compute in."""
    types = {dtype: f"{str(dtype)[6:]} in vectors of {lanes}" for dtype, lanes in vectors.LANES.items()}
    if amx.available():
        types[torch.bfloat16] = "bfloat16 with AMX"
    torchs = f"{torch.backends.cpu.get_cpu_capability()}, {'with' if amx.available() else 'without'} AMX"
    return f"{torchs}; convolutions of ours: {' and '.join(types.values()) or 'none, torch takes them all'}"


def describe_allocator() -> str:
    if process.tune_allocator():
        settings = ", ".join(f"{name}={value}" for name, (_, value) in process.MALLOPT_SETTINGS.items())
        return f"glibc, tuned: {settings}"
    return "not glibc, so not tuned: freed memory goes back to the system and is faulted in again"


def describe_gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return [("GPU", f"none usable (torch {torch.__version__} is built {built})")]
    rows = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"))
    return rows


def try_loaders() -> list[tuple[str, str]]:
    """Does each loader that is installed give the batch that plain indexing gives?"""
    dataset, cpu = shapes10.generate(16, 4), torch.device("cpu")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in LOADERS:
            try:
                import_loader(name)
                pack = write_pack(dataset, name, Path(folder) / name) if name in FORMATS else None
                feed = Feed(name, dataset, 1, cpu, torch.bfloat16, pack)
                found = try_loader(feed.loader("train", batch_size=16, shuffle=True, augment=Augment(cutout_px=8)))
            except UserError as error:
                found = f"not here: {error.message} Try: {error.hint}"
            except Exception as error:  # a library may fail in any way, and the other loaders still be fine
                found = f"does not work: {type(error).__name__}: {error}"
            rows.append((f"loader {name}", found))
    return rows


def try_loader(loader: Loader) -> str:
    images_NHWC, draws, places_B = loader.split.images_NHWC, loader.draws(0, loader.augment), loader.order(0)
    expected_BCHW = augment.apply_torch(torch.tensor(images_NHWC), places_B, draws, places_B, loader.dtype)
    ((x_BCHW, _),) = loader.epoch(0)
    return "works" if torch.equal(x_BCHW, expected_BCHW) else "disagrees with plain torch: please report this"


def try_torchvision() -> str:
    try:
        import_torchvision()
    except ImportError as error:
        return f"does not work: torchvision cannot be imported ({error})"
    return "works, given a network"


def try_triton() -> str:
    """Run one kernel and compare it with float64."""
    if not installed("triton"):
        return "triton is not installed (it exists for Linux only)"
    from fastcifar_kernels import verify

    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = next(verify.verify(device, verify.SMALL, ["weighted_sum"]))
    if not row.passed:
        return "a kernel disagrees with float64: see `fastcifar verify-kernels`"
    if device == "cpu":
        return "need a GPU; CPU tensors take numba loops, which agree with float64. All: `fastcifar verify-kernels`"
    return "agree with float64 on this GPU, as far as one was tried. All: `fastcifar verify-kernels`"
