"""What the figures of a GPU depend on: its name, driver, clocks and limits, the versions and the commit.

python bench/gpu_environment.py --out environment.json
"""

import argparse
import platform
import subprocess
from pathlib import Path

import torch

from fastcifar.benchmarks.loaders import versions
from fastcifar.process import physical_cores, processor
from fastcifar.result import installed
from fastcifar.run import source_commit, write_json

ASKED = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    commit = source_commit()
    facts = {
        "machine": f"{processor()}, {physical_cores()} cores",
        "python": platform.python_version(),
        "versions": versions() | {name: installed(name) for name in ("triton", "nvidia-ml-py", "numpy")},
        "cuda_of_torch": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": commit,
        "dirty": None if commit is None else commit.endswith("-dirty"),
        "gpus": describe_gpus(),
        "nvidia_smi": ask_driver(),
    }
    write_json(parser.parse_args().out, facts)


def describe_gpus() -> list[dict]:
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "sm": f"{gpu.major}{gpu.minor}",
            "processors": gpu.multi_processor_count,
            "bytes": gpu.total_memory,
        }
        for gpu in found
    ]


def ask_driver() -> list[dict[str, str]] | str:
    """A dictionary for each GPU, or why there is none."""
    command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not measured: {error}"
    return [dict(zip(ASKED.split(","), line.split(", "), strict=False)) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    main()
