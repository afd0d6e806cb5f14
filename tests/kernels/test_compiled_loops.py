"""What numba compiles the loops to, and when it has to again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastcifar_kernels
from fastcifar_kernels import compiled_loops
from fastcifar_kernels.compiled_loops import forget_stale

PACKAGE = Path(fastcifar_kernels.__file__).parent
MEAN = """
import torch
from fastcifar_kernels import batch_statistics
print(batch_statistics(torch.full((1, 1, 8, 1, 1), 3.0))[0].mean().item())
"""
ROUND = """
import torch
from fastcifar_kernels import bn_gelu
bn_gelu(torch.randn(2, 64).bfloat16(), *torch.zeros(2, 64), torch.ones(64))
"""


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_loop_is_compiled_anew_when_what_it_takes_from_another_file_has_changed(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    copy = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    assert run(MEAN, PYTHONPATH=str(tmp_path)) == "3.0"
    text = (copy / "loops.py").read_text()
    widened = "types.float32(number), lambda context, builder, signature, arguments: "
    assert widened + "arguments[0]" in text
    (copy / "loops.py").write_text(text.replace(widened + "arguments[0]", widened + "builder.fneg(arguments[0])"))
    assert run(MEAN, PYTHONPATH=str(tmp_path)) == "-3.0"


def test_only_what_is_stale_and_compiled_is_deleted(tmp_path, monkeypatch):
    sources, cache = tmp_path / "sources", tmp_path / "__pycache__"
    sources.mkdir()
    (sources / "loops.py").write_text("one")
    monkeypatch.setattr(compiled_loops, "__file__", str(sources / "compiled_loops.py"))
    forget_stale(tmp_path)
    files = [cache / "loop.nbi", cache / "loop.1.nbc", cache / "loops.pyc"]
    for file in files:
        file.touch()
    forget_stale(tmp_path)
    assert all(file.exists() for file in files)
    (sources / "loops.py").write_text("two")
    forget_stale(tmp_path)
    assert [file.exists() for file in files] == [False, False, True]


def test_loops_compile_for_a_processor_that_numba_is_told_of(tmp_path):
    """LLVM ends the process where it meets an instruction that this one does not have."""
    run(ROUND, NUMBA_CPU_NAME="generic", NUMBA_CACHE_DIR=str(tmp_path))
