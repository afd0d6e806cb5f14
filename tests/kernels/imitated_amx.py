"""AMX where the processor has none: its instructions trap, and what they would have done is done here.

A thread that meets an instruction its processor does not know gets SIGILL. The handler reads which one it was, does on
arrays what the manual says, and lets the thread go on behind it. So the loops run as they are, assembly and all, but
far more slowly. As a plugin of pytest:

    PYTHONPATH=tests/kernels python -m pytest -p imitated_amx tests/kernels/test_amx.py

Source: Intel's Software Developer's Manual, volume 2, and Linux's asm/ucontext.h. Subnormal numbers count here, while
AMX takes them for 0.
"""

# numba changes what its decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

import ctypes
import signal

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from fastcifar_kernels import amx
from fastcifar_kernels.loops import widen

REGISTERS_BYTE = 40  # where the 64-bit registers begin in the context of a signal
# Which of them is which, by the number that an instruction gives it: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
GENERAL = np.array([13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7])
RIP = 16
LDTILECFG_TILEZERO, TILELOADD_TILESTORED, TDPBF16PS = 0x49, 0x4B, 0x5C
NONE, F3, F2 = 0, 2, 3  # an instruction's prefix, as VEX encodes it
SA_SIGINFO = 4

# A thread's tiles lie where its pthread_t says: those of two threads are 2,049 pages apart, their stacks and a guard.
PLACES = 4096
_tiles = np.zeros((PLACES, 8, 16, 64), np.uint8)
_sums = np.zeros((PLACES, 2, 16), np.float32)
_configured = np.zeros(PLACES, np.uint64)  # 0, or whose they are
TILES, SUMS, CONFIGURED = _tiles.ctypes.data, _sums.ctypes.data, _configured.ctypes.data  # numba copies an array

_libc = ctypes.CDLL(None)
pthread_self, abort = _libc.pthread_self, _libc.abort
pthread_self.argtypes, pthread_self.restype = [], ctypes.c_uint64
abort.argtypes, abort.restype = [], None


@intrinsic
def pointer(context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), generate


@njit
def number(code, size):
    """A signed number of so many bytes."""
    value = np.int64(0)
    for byte in range(size):
        value |= np.int64(code[byte]) << (8 * byte)
    return value - (np.int64(1) << (8 * size)) if size and code[size - 1] & 128 else value


@njit
def multiply(out_MN, left_MK, right_KN2, sums_2N):
    for m in range(16):
        sums_2N[:] = 0
        for k in range(16):
            first, second = widen(left_MK[m, 2 * k]), widen(left_MK[m, 2 * k + 1])
            for n in range(16):
                sums_2N[0, n] += first * widen(right_KN2[k, n, 0])
                sums_2N[1, n] += second * widen(right_KN2[k, n, 1])
        for n in range(16):
            out_MN[m, n] += sums_2N[0, n] + sums_2N[1, n]


@cfunc(types.void(types.int32, types.int64, types.int64))
def imitate(signal_number, info, context):
    registers = carray(pointer(context + REGISTERS_BYTE), 23, np.int64)
    code = carray(pointer(registers[RIP]), 15, np.uint8)
    thread = pthread_self()
    place = np.int64(thread >> np.uint64(12)) % PLACES
    tiles = carray(pointer(TILES + place * 8192), (8, 16, 64), np.uint8)
    configured = carray(pointer(CONFIGURED + place * 8), 1, np.uint64)

    # C4, then inverted bits 3 of reg, index and base, 0F38; W = 0, inverted fourth operand, 128 bits, prefix; opcode.
    if code[0] != 0xC4 or code[1] & 31 != 2 or code[2] & 0x84:
        abort()
    fourth, prefix, opcode = (~code[2] >> 3) & 15, code[2] & 3, code[3]
    mode, reg, rm = code[4] >> 6, (code[4] >> 3) & 7, code[4] & 7
    size, start, stride = 5, np.int64(0), np.int64(0)
    if mode != 3:
        base = rm | (0 if code[1] & 32 else 8)
        if rm == 4:  # base + index * scale
            base = (code[5] & 7) | (0 if code[1] & 32 else 8)
            index = (code[5] >> 3) & 7 | (0 if code[1] & 64 else 8)
            if index != 4:
                stride = registers[GENERAL[index]] << (code[5] >> 6)
            size = 6
        if mode == 0 and base & 7 == 5:  # relative to rip, or no base: not in these loops
            abort()
        distance = 0 if mode == 0 else 1 if mode == 1 else 4
        start = registers[GENERAL[base]] + number(code[size:], distance)
        size += distance

    if opcode == LDTILECFG_TILEZERO and prefix == NONE:
        tiles[:] = 0
        if mode == 3:
            configured[0] = 0  # tilerelease
        else:
            given = carray(pointer(start + stride), 64, np.uint8)
            whole = given[0] == 1
            for tile in range(8):
                whole &= given[16 + 2 * tile] == 64 and given[17 + 2 * tile] == 0 and given[48 + tile] == 16
            taken = configured[0] != 0 and configured[0] != thread  # two threads at one place
            if taken or not whole:  # tiles of other sizes are not imitated
                abort()
            configured[0] = thread
    elif configured[0] != thread:
        abort()
    elif opcode == LDTILECFG_TILEZERO and prefix == F2 and mode == 3:
        tiles[reg] = 0
    elif opcode == TILELOADD_TILESTORED and prefix >= F3 and mode != 3 and rm == 4:
        for row in range(16):
            memory = carray(pointer(start + row * stride), 64, np.uint8)
            if prefix == F2:
                tiles[reg, row] = memory
            else:
                memory[:] = tiles[reg, row]
    elif opcode == TDPBF16PS and prefix == F3 and mode == 3:
        out_MN = carray(pointer(TILES + place * 8192 + reg * 1024), (16, 16), np.float32)
        left_MK = carray(pointer(TILES + place * 8192 + rm * 1024), (16, 32), np.uint16)
        right_KN2 = carray(pointer(TILES + place * 8192 + fourth * 1024), (16, 16, 2), np.uint16)
        multiply(out_MN, left_MK, right_KN2, carray(pointer(SUMS + place * 128), (2, 16), np.float32))
    else:
        abort()
    registers[RIP] += size


class _SigAction(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def install() -> None:
    """From now on this process has AMX."""
    llvmlite.binding.initialize_native_asmparser()
    action = _SigAction(handler=imitate.address, flags=SA_SIGINFO)
    if _libc.sigaction(signal.SIGILL, ctypes.byref(action), None):
        raise OSError("no handler for SIGILL")
    amx._AVAILABLE = True


def pytest_sessionstart() -> None:
    install()  # not before: pytest's own faulthandler takes SIGILL, too
