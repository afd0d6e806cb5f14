"""The process itself: when it started, how it allocates memory, how many threads it runs.

Call `tune_allocator` before the first large allocation and `set_threads` once torch is imported.
"""

import ctypes
import gc
import os
import platform
import time
from pathlib import Path

import psutil

# Parameter numbers of mallopt(3) and the values we give them: never hand freed memory back to the kernel.
MALLOPT_SETTINGS = {
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, -1),  # never; 2**31 - 1, the largest number, gives back what exceeds 2 GB
    "M_TOP_PAD": (-2, 256 * 2**20),
}


def age_s() -> float:
    """Seconds since this process was started by the kernel, imports included."""
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:  # not Linux: whole seconds are the best there is
        return time.time() - psutil.Process().create_time()
    # Field 22, counted after the command name, which is in brackets and may hold spaces.
    start_ticks = int(stat.rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def tune_allocator() -> bool:
    """Keep freed memory in the process; True if glibc took every setting.

    By default glibc maps each large tensor anew and unmaps it when it is freed, and page faults then cost as much as
    the arithmetic: a training step of 2,000 images takes 3.9 s before and 1.9 s after this call (2 cores, LOG.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(number, value) == 1 for number, value in MALLOPT_SETTINGS.values()])


def collect_garbage() -> None:
    """From now on; what is there already, imported modules above all, is never looked at again.

    Whoever has turned collection off until then has spared 0.4 s of a start of 4.8: imports make 600,000 objects and
    hardly any garbage.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def physical_cores() -> int:
    """Physical cores for this process: hyper-threads share the matrix units, so they only add contention.

    The processes that torchrun starts on a machine share its cores.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def set_threads() -> int:
    """Give torch and numba one thread per physical core; returns that number."""
    import numba
    import torch

    threads = physical_cores()
    torch.set_num_threads(threads)
    # OpenMP's threads stay awake for a moment, and those of TBB, which numba prefers where it is installed, must be
    # woken for every loop: the resident loader makes 1.6 against 1.2 million images a second (LOG.md).
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    return threads


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
