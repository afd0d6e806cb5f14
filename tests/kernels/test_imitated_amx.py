"""The loops for AMX on processors without it, by `imitated_amx`."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastcifar_kernels import amx
from fastcifar_kernels.loops import FEATURES

HERE = Path(__file__).parent
TESTS = ["test_amx.py", "test_blocked.py", "test_winograd.py", "../models/test_speednet.py"]
OTHERS = "float32", "interpreted"  # these take no loop for AMX


@pytest.mark.skipif(amx.available(), reason="AMX itself is here")
@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64") or not {"avx512bw", "avx512bf16"} <= FEATURES,
    reason="the rest of these loops needs AVX-512 with bfloat16",
)
def test_loops_for_amx_with_its_instructions_imitated():
    which = " and ".join(f"not {name}" for name in OTHERS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "imitated_amx", "-rs", "-k", which]
    command += [str(HERE / name) for name in TESTS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.getenv("PYTHONPATH")]))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "no AMX here" not in done.stdout
