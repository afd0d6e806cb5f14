"""What the process knows of itself."""

import subprocess
import sys
import time

import psutil
import pytest

FAULTS = """
import resource, sys
from fastcifar.process import tune_allocator
if sys.argv[1] == "tuned":
    assert tune_allocator()
import torch
torch.set_num_threads(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(16 * 2**20)
for _ in range(20):
    (x + 1).sum()
before = faults()
for _ in range(20):
    (x + 1).sum()
print(faults() - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_tuned_allocator_reuses_memory_without_page_faults():
    """64 MB come and go 20 times: 16,384 pages each time by default, none once freed memory has stayed a while."""
    assert page_faults("plain") > 20 * 10_000
    assert page_faults("tuned") < 20_000


GIGABYTES = """
import resource
from fastcifar.process import tune_allocator
assert tune_allocator()
for turn in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * 2_500_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(psutil.virtual_memory().available < 4 * 2**30, reason="needs 4 GB")
def test_more_than_2_gigabytes_stay_as_well():
    """glibc's largest number for what may stay is not enough: 2.5 GB came back as 545,000 new pages."""
    done = subprocess.run([sys.executable, "-c", GIGABYTES], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000


def test_age_counts_from_the_start_of_the_process():
    began = time.monotonic()
    script = "import time; time.sleep(1); from fastcifar.process import age_s; print(age_s())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1.0 <= float(done.stdout) <= time.monotonic() - began + 0.02


def test_threads_are_the_physical_cores_allowed():
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from fastcifar.process import set_threads; import torch, numba\n"
        "print(set_threads(), torch.get_num_threads(), numba.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "1"]
