"""What the Triton compiler makes of the kernels, for architectures that this machine need not have."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastcifar_kernels
from fastcifar_kernels import compiled

EXAMINE = """
import json
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context

import torch
from fastcifar_kernels import compiled

def rows(given):
    return [asdict(row) for row in compiled.examine(*given)]

# float16 compiles as bfloat16 does, so large shapes are enough for it.
given = [one for one in product(compiled.ARCHITECTURES, compiled.SHAPES, compiled.DTYPES)
         if one[1][0] == 512 or one[2] != torch.float16]
with get_context("fork").Pool(2) as pool:
    print(json.dumps([row for some in pool.imap(rows, given) for row in some]))
"""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# These read filters once, or write sums, a few values for each tile or channel: that may be narrow.
NARROW_LOADS = {"_aggregate_weights_fwd_kernel"}
BYTE_LOADS = {"_crop_flip_fwd_kernel"}  # looks up bytes that a mirror may have turned around
NARROW_STORES = {
    "_batch_statistics_kernel",
    "_merge_kernel",
    "_bn_relu_weighted_sum_sums_kernel",
    "_bn_gelu_sums_kernel",
    "_aggregate_weights_bwd_kernel",
}


@pytest.fixture(scope="module")
def rows() -> list[SimpleNamespace]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", EXAMINE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [SimpleNamespace(**row) for row in json.loads(done.stdout)]
    for row in found:
        row.loads, row.stores = ({int(bits): count for bits, count in w.items()} for w in (row.loads, row.stores))
    return found


def test_every_kernel_is_compiled_for_every_architecture(rows):
    sources = [file.read_text() for file in Path(fastcifar_kernels.__file__).parent.glob("*.py")]
    kernels = {name for source in sources for name in re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", source)}
    assert len(kernels) >= 9
    assert {(row.arch, row.kernel) for row in rows} == {(a, k) for a in compiled.ARCHITECTURES for k in kernels}


def test_registers_and_shared_memory_leave_room_for_many_programs(rows):
    """168 registers: three programs of 128 threads on a multiprocessor. 16 KB: ten programs and more.

    triton 3.7 takes 176 for one kernel on sm_100, which leaves two.
    """
    many = [row for row in rows if row.kernel == "_scaled_copies_bwd_kernel" and row.shape[1] == 16]
    assert [row for row in rows if row.registers > 176 and row not in many] == []
    assert max(row.registers for row in many) < 255  # a running sum for each of the 16 experts
    assert [row for row in rows if row.shared_bytes > 16384] == []


def test_nothing_spills(rows):
    """Registers that do not fit go to memory and back, slow in a loop.

    triton 3.7 and 3.9: none. 3.6: one kernel of 675 gives up 8 bytes, for room for one more program.
    """
    assert [row for row in rows if row.spilled_bytes > 8] == []
    assert len([row for row in rows if row.spilled_bytes]) <= 1


def test_threads_load_and_store_16_bytes_at_once(rows):
    """Wherever 16 bytes divide what is contiguous and there is a whole tile; nothing is loaded value by value."""
    wide = [row for row in rows if row.shape[2] * ITEM_BYTES[row.dtype] % 16 == 0 and math.prod(row.shape) > 2**20]
    assert len({row.kernel for row in wide}) == len({row.kernel for row in rows})
    for row in wide:
        if row.kernel not in NARROW_LOADS | BYTE_LOADS:
            assert 128 in row.loads, row
        assert min(row.loads) > 16 or row.kernel in BYTE_LOADS, row
        if row.kernel not in NARROW_STORES:
            assert 128 in row.stores, row


def test_crop_flip_rounds_after_the_multiplication_too():
    """As plain torch does: fused with the addition, it would give other bits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PTX_OF_CROP_FLIP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".entry _crop_flip_fwd_kernel") == 2
    assert "mul.f32" in done.stdout or "mul.rn.f32" in done.stdout
    assert "fma" not in done.stdout


PTX_OF_CROP_FLIP = """
import torch
from fastcifar_kernels import compiled

for dtype in (torch.float32, torch.bfloat16):
    with compiled.compiling_only(90) as launched:
        for launch in compiled.launches((32, 1, 8, 32, 32), dtype):
            if "drawn" in launch.__code__.co_freevars:
                launch()
    print(launched[0][1].asm["ptx"])
"""
PTX = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_last.v2.b64 { %rd4, %rd5 }, [ %rd1 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd2];
    ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r13];
    ld.param.u64 %rd3, [param_0];
    cp.async.cg.shared.global [ %r14 + 0 ], [ %rd6 + 0 ], 0x10, %r15;
    cp.async.ca.shared.global [ %r14 + 0 ], [ %rd6 + 0 ], 0x4, %r15;
    @%p2 st.global.v2.b32 [ %rd7 + 0 ], { %r16, %r17 };
    st.global.f32 [ %rd8 + 0 ], { %r18 };
"""


def test_access_widths_count_bits_of_global_accesses():
    assert compiled.access_widths(PTX, "ld") == {16: 1, 32: 1, 128: 4}
    assert compiled.access_widths(PTX, "st") == {32: 1, 64: 1}
    assert compiled.access_widths("", "ld") == {}


def test_resource_usage_reads_what_the_tool_reports(monkeypatch):
    report = (
        "Resource usage:\n Common:\n  GLOBAL:0\n Function _some_kernel:\n"
        "  REG:96 STACK:8 SHARED:2048 LOCAL:0 CONSTANT[0]:1004 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    given = []

    def run(command, **_):
        given.append(Path(command[-1]).read_bytes())
        return subprocess.CompletedProcess(command, 0, stdout=report)

    monkeypatch.setattr(compiled.subprocess, "run", run)
    usage = compiled.resource_usage(b"machine code")
    assert given == [b"machine code"]
    assert {name: usage[name] for name in ("REG", "STACK", "SHARED", "LOCAL")} == {
        "REG": 96,
        "STACK": 8,
        "SHARED": 2048,
        "LOCAL": 0,
    }
