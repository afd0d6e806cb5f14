"""How the work on [N, P, K, C] is cut into programs and tiles.

A tile is [BLOCK_K, BLOCK_P, BLOCK_C]: some experts of some pixels of one sample. Its channels are contiguous, so a
thread loads 16 bytes at once; its experts lie in one thread, so summing over them is free of communication, and what
belongs to a channel (mean, scale, running sums) stays in that thread's registers from tile to tile.

A program walks the tiles of some pieces (a sample, or part of one where samples are few) and of one block of channels.
The cut depends on the shape alone, never on the GPU or on a measurement: the order of summation, and with it every bit
of the result, is the same everywhere.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

THREAD_BYTES = 16  # one global load of a thread
WARPS = 4
PROGRAMS = 2048  # enough to fill any GPU several times over, few enough to keep partial sums below 5 % of the bytes


@dataclass(frozen=True)
class Cut:
    """The launch grid (experts, channels, pieces), and the numbers by which a kernel finds its part of [N, P, K, C]."""

    grid: tuple[int, int, int]
    sizes: dict[str, Any]

    @property
    def splits(self) -> int:
        """Programs that share a channel: as many partial sums it gets."""
        return self.grid[2]


def cut(y_NPKC: Tensor, experts_at_once: int | None) -> Cut:
    """Cut the work on `y_NPKC` (not empty); a program handles so many experts, or (None) all, four after four."""
    n, p, k, c = y_NPKC.shape
    block_k = triton.next_power_of_2(min(k, experts_at_once or 4))
    block_c = min(triton.next_power_of_2(c), 128)
    rows = WARPS * 32 * THREAD_BYTES // y_NPKC.element_size() // block_c
    block_p = min(triton.next_power_of_2(p), rows // max(1, block_k // 8))  # a thread has registers for eight experts
    groups = triton.cdiv(k, block_k) if experts_at_once else 1
    channel_blocks = triton.cdiv(c, block_c)

    wanted = triton.cdiv(PROGRAMS, groups * channel_blocks)
    pieces = min(triton.cdiv(p, block_p), triton.cdiv(wanted, n))
    piece_pixels = triton.cdiv(triton.cdiv(p, block_p), pieces) * block_p
    pieces = triton.cdiv(p, piece_pixels)
    pieces_per_program = triton.cdiv(n * pieces, wanted)
    sizes = {
        "pixels": p,
        "channels": c,
        "y_stride_n": y_NPKC.stride(0),
        "y_stride_p": y_NPKC.stride(1),
        "y_stride_k": y_NPKC.stride(2),
        "pieces": pieces,
        "piece_pixels": piece_pixels,
        "all_pieces": n * pieces,
        "pieces_per_program": pieces_per_program,
        "EXPERTS": k,
        "BLOCK_K": block_k,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "num_warps": WARPS,
        "enable_fp_fusion": True,
    }
    return Cut((groups, channel_blocks, triton.cdiv(n * pieces, pieces_per_program)), sizes)


@triton.jit
def place(BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The experts and channels of this program and the pixels of a tile, along the three axes of a tile."""
    k_K11 = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None, None]
    p_1P1 = tl.arange(0, BLOCK_P)[None, :, None]
    c_11C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    return k_K11, p_1P1, c_11C


@triton.jit
def walk(all_pieces, pieces_per_program):
    """The first piece of this program, and the one after its last."""
    first = tl.program_id(2) * pieces_per_program
    return first, tl.minimum(first + pieces_per_program, all_pieces)


@triton.jit
def bounds(piece, pieces, piece_pixels, pixels):
    """A piece's sample, its first pixel, and the one after its last. The sample counts in 64 bits."""
    start = piece % pieces * piece_pixels
    return (piece // pieces).to(tl.int64), start, tl.minimum(start + piece_pixels, pixels)
