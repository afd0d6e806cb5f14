"""How the work on [N, P, K, C] is cut into programs and tiles.

A tile is [BLOCK_P, BLOCK_C]: some pixels of one sample and expert. Its channels are contiguous, so a thread loads 16
bytes at once. A kernel takes the same tile of its experts one after the other, so a thread holds the same pixels and
channels of each: summing over experts needs no communication, and what belongs to a channel (mean, scale, running sums)
stays in that thread's registers from tile to tile. (Tiles of three axes would be shorter to write, but which axis then
stays within a thread differs between versions of triton.)

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


def cut(y_NPKC: Tensor, experts_at_once: int) -> Cut:
    """Cut the work on `y_NPKC` (not empty), a program handling at most so many experts."""
    n, p, k, c = y_NPKC.shape
    block_k = experts_of_program(k, experts_at_once)
    block_c = min(triton.next_power_of_2(c), 128)
    rows = WARPS * 32 * THREAD_BYTES // y_NPKC.element_size() // block_c
    block_p = min(triton.next_power_of_2(p), rows)
    channel_blocks = triton.cdiv(c, block_c)

    wanted = triton.cdiv(PROGRAMS, k // block_k * channel_blocks)
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
    return Cut((k // block_k, channel_blocks, triton.cdiv(n * pieces, pieces_per_program)), sizes)


def experts_of_program(experts: int, at_once: int) -> int:
    """As many as can be handled at once, and as many in every program: no kernel meets an expert that is not there."""
    return max(count for count in range(1, min(experts, at_once) + 1) if experts % count == 0)


@triton.jit
def place(BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The pixels of a tile, and the channels of this program."""
    p_P1 = tl.arange(0, BLOCK_P)[:, None]
    c_1C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return p_P1, c_1C


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
