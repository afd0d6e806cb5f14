"""Whether `fastcifar_kernels.verify` finds faults: it is run on copies of the package with one fault in each."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastcifar_kernels
from fastcifar_kernels import amx, vectors, verify

PACKAGE = Path(fastcifar_kernels.__file__).parent
# Most faults show in the smallest shapes.
SHAPES = {
    "TRITON": sorted(verify.SMALL, key=math.prod),
    "NUMBA": sorted((shape for shape in verify.MEDIUM if math.prod(shape) < 200_000), key=math.prod),
}
SECONDS = 120  # for a copy; a fault may make it hang

_spec = importlib.util.spec_from_file_location("mutations", Path(__file__).with_name("mutations.py"))
assert _spec is not None
assert _spec.loader is not None
mutations = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mutations)

FAULTS = {name: (side, *rest) for side in ("TRITON", "NUMBA") for name, *rest in getattr(mutations, side)}
NEEDS = {"AMX": amx.available(), "Winograd": bool(vectors.LANES)}  # by the first word of a fault's name
MISSING = [name for name in FAULTS if not NEEDS.get(name.split(":")[0], True)]  # no row would miss, after a long time
SOUND = {f"unchanged, {side}": (side, "tiles.py", "", "", "batch_statistics") for side in ("TRITON", "NUMBA")}

# Imports what takes long once, and forks a child for each copy: two at a time, each ended after so many seconds.
RUN = """
import json, os, signal, sys
import numba, torch, triton

njit = numba.njit
numba.njit = lambda *functions, **how: njit(*functions, **how | {"parallel": False})  # halves what LLVM has to do

def judge(folder, interpret, op, shapes):
    if not interpret:  # read at every call; what triton itself compiles was imported above
        del os.environ["TRITON_INTERPRET"]
    sys.path.insert(0, folder)
    from fastcifar_kernels import verify
    assert verify.__file__.startswith(folder) and sys.modules["fastcifar_kernels." + op].__file__.startswith(folder)
    for row in verify.verify("cpu", shapes, [op]):
        if not row.passed:
            print(row, file=open(os.path.join(folder, "missed"), "w"))
            return 1
    return 0

seconds, jobs = json.load(sys.stdin)
running, codes = {}, {}
while jobs or running:
    while jobs and len(running) < 2:
        name, *job = jobs.pop()
        pid = os.fork()
        if not pid:
            signal.alarm(seconds)
            code = 2
            try:
                os.dup2(os.open(os.path.join(job[0], "said"), os.O_WRONLY | os.O_CREAT), 2)
                code = judge(*job)
            finally:
                if sys.exc_info()[0]:
                    sys.excepthook(*sys.exc_info())
                    sys.stderr.flush()
                os._exit(code)
        running[pid] = name
    pid, status = os.wait()
    codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """For every fault the exit code and what was said: 0 passed, 1 a row that missed, 2 an error, negative a signal."""
    jobs, folders = [], {}
    runnable = {name: fault for name, fault in FAULTS.items() if name not in MISSING}
    for number, (name, (side, file, old, new, op)) in enumerate((SOUND | runnable).items()):
        folders[name] = folder = tmp_path_factory.mktemp(f"copy{number}")
        copy = shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / file).write_text((PACKAGE / file).read_text().replace(old, new))
        jobs.append((name, str(folder), side == "TRITON", op, SHAPES[side][: None if old else 4]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if not amx.available():  # nearly all the time is LLVM's; numba warns of what it then cannot keep
        environment |= {"NUMBA_OPT": "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps((SECONDS, jobs)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)

    def said(folder: Path) -> str:
        return "\n".join((folder / file).read_text() for file in ("missed", "said") if (folder / file).exists())

    return {name: (codes[name], said(folder)) for name, folder in folders.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_what_it_says(name):
    """So that the list cannot rot: the text that it changes stands in the file, once."""
    _, file, old, new, _ = FAULTS[name]
    assert (PACKAGE / file).read_text().count(old) == 1
    assert old != new


def test_every_kernel_has_two_faults():
    for file in PACKAGE.glob("*.py"):
        for part in file.read_text().split("\n@triton.jit\ndef ")[1:]:
            kernel, body = part.split("(", 1)[0], part.split("\n\n\n")[0]
            if kernel.endswith("_kernel"):
                faults = [name for name, (_, where, old, *_) in FAULTS.items() if where == file.name and old in body]
                assert len(faults) >= 2, kernel


@pytest.mark.faults
@pytest.mark.parametrize("name", SOUND)
def test_an_unchanged_copy_passes(outcomes, name):
    assert outcomes[name] == (0, "")


@pytest.mark.faults
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(outcomes, name):
    if name in MISSING:
        pytest.skip("this processor does not run it")
    code, said = outcomes[name]
    assert code == 1, f"ended with {code}: {said}"
