"""What a GPU's driver counts of its energy, through `pynvml` (`pip install 'fastcifar[gpu]'`) where that is installed.

The counter is of the whole board and moves only every tenth of a second or so: read it around seconds of work.
"""

from collections.abc import Callable

import torch

ReadJoules = Callable[[], float]


def open_counter(device: torch.device) -> tuple[ReadJoules | None, str]:
    """(a function that reads the joules used since the driver was loaded, ""), or (None, why there is none)."""
    if device.type != "cuda":
        return None, "only a GPU's driver counts energy"
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None, "pynvml is not installed: pip install 'fastcifar[gpu]'"
    try:
        pynvml.nvmlInit()
        # By UUID: $CUDA_VISIBLE_DEVICES numbers the GPUs anew, the driver does not.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return None, f"the driver does not report it ({error})"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000, ""
