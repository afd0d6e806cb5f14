"""3x3 convolutions of blocked images on AMX, in bfloat16.

32 images and 32 channels of a pixel are four whole tiles, whatever the size of the image, neighbours outside it are
left out instead of multiplied with 0, and nothing is copied on the way. The gradient of the filters sums over images,
which therefore have to become columns; they are transposed into the cache as they are used.

Shapes as in `conv_blocked`.
"""

# numba changes what its decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false

import numba
import numpy as np
import torch
from torch import Tensor

from fastcifar_kernels import amx
from fastcifar_kernels.layout import GROUP
from fastcifar_kernels.loops import as_array, narrow, parts_of, widen

BLOCK = 32 * 32 * 4  # bytes of a block in float32
TILES = 2 * 1024  # bytes of 32 images' 32 channels
# Of tiles that the gradient of the filters works on at a time: they should stay in a core's L2 cache.
BAND_BYTES = 2**20
# Of filters that all pixels of a group meet before the next ones: all 384 of 384 channels, 2.6 MB, took 57 ms, not 45.
CACHED_FILTERS = 2**19


def forward(x_GHWMC: Tensor, w_OCHW: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """The output, and which of four pixels was the largest."""
    groups, height, width, _, channels = x_GHWMC.shape
    filters = len(w_OCHW)
    size = (height // 2, width // 2) if pool else (height, width)
    out_GHWMO = torch.empty((groups, *size, GROUP, filters), dtype=torch.bfloat16)
    which = torch.empty((groups, *size, GROUP, filters // 32, 2) if pool else (0,), dtype=torch.int32)
    w = _right_tiles(w_OCHW)
    shape = groups, height, width, channels
    parts = parts_of(groups)
    blocks = torch.empty((parts, 4 * BLOCK // 4))
    to = out_GHWMO.data_ptr(), which.data_ptr(), filters
    _forward(x_GHWMC.data_ptr(), *shape, w.data_ptr(), *to, pool, blocks.data_ptr(), parts, amx.WHOLE_TILES)
    return out_GHWMO, which


def to_input(w_OCHW: Tensor, which: Tensor, grad_GHWMO: Tensor, pool: bool, height: int, width: int) -> Tensor:
    """The gradient of x, which has so many rows and columns."""
    groups, rows, columns, _, filters = grad_GHWMO.shape
    rows, columns = (2 * rows, 2 * columns) if pool else (rows, columns)
    channels, parts = w_OCHW.size(1), parts_of(groups)
    grad_x_GHWMC = torch.empty((groups, height, width, GROUP, channels), dtype=torch.bfloat16)
    turned = _right_tiles(w_OCHW, turned=True)
    blocks = torch.empty((parts, BLOCK // 4))
    unpooled = torch.empty((parts, rows, columns, GROUP, filters) if pool else (0,), dtype=torch.bfloat16)
    given = grad_GHWMO.data_ptr(), which.data_ptr(), groups, rows, columns, filters, turned.data_ptr()
    to = grad_x_GHWMC.data_ptr(), height, width, channels, pool, blocks.data_ptr(), unpooled.data_ptr()
    _to_input(*given, *to, parts, amx.WHOLE_TILES)
    return grad_x_GHWMC


def to_filters(x_GHWMC: Tensor, w_OCHW: Tensor, which: Tensor, grad_GHWMO: Tensor, pool: bool) -> Tensor:
    """The gradient of w."""
    groups, height, width, _, channels = x_GHWMC.shape
    _, rows, columns, _, filters = grad_GHWMO.shape
    rows, columns = (2 * rows, 2 * columns) if pool else (rows, columns)
    parts = parts_of(groups)
    row_bytes = width * TILES * (channels // 32 + 1)
    band = max(2, min(rows, BAND_BYTES // row_bytes // 2 * 2))
    sums = torch.empty((parts, filters // 32, channels // 32, 9, 32, 32))
    scattered = torch.empty((parts, 4 * TILES // 4))
    left = torch.empty((parts, band * columns * TILES // 4))
    right = torch.empty((parts, channels // 32 * (band + 2) * width * TILES // 4))
    given = x_GHWMC.data_ptr(), groups, height, width, channels, grad_GHWMO.data_ptr(), which.data_ptr()
    to = rows, columns, filters, pool, band, sums.data_ptr()
    buffers = scattered.data_ptr(), left.data_ptr(), right.data_ptr()
    _to_filters(*given, *to, *buffers, parts, amx.WHOLE_TILES)
    grad_w_OHWC = torch.empty((filters, 3, 3, channels), dtype=w_OCHW.dtype)
    _unpack_sums(as_array(sums), as_array(grad_w_OHWC))
    return grad_w_OHWC.permute(0, 3, 1, 2)


def _right_tiles(w_OCHW: Tensor, turned: bool = False) -> Tensor:
    """See `_pack_filters`."""
    o, c = w_OCHW.shape[1::-1] if turned else w_OCHW.shape[:2]
    out = torch.empty((o // 32, 2, 9, c // 32, 16, 16, 2), dtype=torch.bfloat16)
    _pack_filters(as_array(w_OCHW.permute(0, 2, 3, 1).contiguous()), turned, as_array(out))
    return out


# numba: filters as [O, 3, 3, C], so that a neighbour's channels lie side by side


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _pack_filters(w_OHWC, turned, out):  # pragma: no cover
    """As right matrices [O / 32, 2 tiles, 9, C / 32, 16 pairs of channels, 16 filters, 2].

    If `turned`, those of the gradient of x: filters and channels swapped, the nine neighbours in reverse.
    """
    for block in numba.prange(len(out)):
        for neighbour in range(9):
            source = 8 - neighbour if turned else neighbour
            for c in range(out.shape[3]):
                for tile in range(2):
                    for pair in range(16):
                        for column in range(16):
                            for half in range(2):
                                i, o = 32 * c + 2 * pair + half, 32 * block + 16 * tile + column
                                value = (
                                    w_OHWC[i, source // 3, source % 3, o]
                                    if turned
                                    else w_OHWC[o, source // 3, source % 3, i]
                                )
                                out[block, tile, neighbour, c, pair, column, half] = narrow(widen(value), np.uint16(0))


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _unpack_sums(sums_PBC9OI, out_OHWC):  # pragma: no cover
    """The gradient of the filters from each part's blocks [part, O / 32, C / 32, 9, 32, 32]."""
    filters, _, _, channels = out_OHWC.shape
    for o in numba.prange(filters):
        for neighbour in range(9):
            for c in range(channels):
                total = np.float32(0)
                for part in range(len(sums_PBC9OI)):
                    total += sums_PBC9OI[part, o // 32, c // 32, neighbour, o % 32, c % 32]
                out_OHWC[o, neighbour // 3, neighbour % 3, c] = narrow(total, out_OHWC[o, 0, 0, 0])


# numba: x, w ... are addresses. Every thread takes one part of the groups, and has a row of each buffer for itself.


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _one_pixel(x, height, width, channels, w, i, j):  # pragma: no cover
    """The block becomes what 32 filters `w` make of the neighbours of pixel (i, j) of a group `x`."""
    stride = 2 * channels
    amx.clear_block()
    for di in range(max(0, 1 - i), min(3, height + 1 - i)):
        for dj in range(max(0, 1 - j), min(3, width + 1 - j)):
            left = x + ((i + di - 1) * width + j + dj - 1) * GROUP * stride
            right = w + (3 * di + dj) * (channels // 32) * 1024
            further = right + 9 * (channels // 32) * 1024
            amx.multiply_rows(left, left + 16 * stride, stride, right, further, channels // 32)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _convolve(x, height, width, channels, w, out, out_height, out_width, filters, block):  # pragma: no cover
    """One group without pooling."""
    blocks_o = filters // 32
    cached_o = max(1, CACHED_FILTERS // (576 * channels))
    for o_from in range(0, blocks_o, cached_o):
        for i in range(out_height):
            for j in range(out_width):
                for o in range(o_from, min(blocks_o, o_from + cached_o)):
                    _one_pixel(x, height, width, channels, w + o * 9 * (channels // 32) * TILES, i, j)
                    amx.store_block(block)
                    amx.narrow_block(block, out + ((i * out_width + j) * GROUP * filters + 32 * o) * 2, 2 * filters)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _convolve_and_pool(x, height, width, channels, w, out, which, filters, blocks):  # pragma: no cover
    """One group; `which` is where the numbers of the largest go, 8 bytes for 32 channels."""
    blocks_o = filters // 32
    cached_o = max(1, CACHED_FILTERS // (576 * channels))
    for o_from in range(0, blocks_o, cached_o):
        for i in range(height // 2):
            for j in range(width // 2):
                for o in range(o_from, min(blocks_o, o_from + cached_o)):
                    for part in range(4):
                        w_o = w + o * 9 * (channels // 32) * TILES
                        _one_pixel(x, height, width, channels, w_o, 2 * i + part // 2, 2 * j + part % 2)
                        amx.store_block(blocks + BLOCK * part)
                    first = (i * (width // 2) + j) * GROUP * filters + 32 * o
                    amx.narrow_largest(blocks, out + 2 * first, 2 * filters, which + first // 4, filters // 4)


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _forward(
    x, groups, height, width, channels, w, out, which, filters, pool, blocks, parts, tiles
):  # pragma: no cover
    for part in numba.prange(parts):
        amx.configure(tiles.ctypes.data)
        own = blocks + part * 4 * BLOCK
        for g in range(part * groups // parts, (part + 1) * groups // parts):
            x_g = x + g * height * width * GROUP * channels * 2
            if pool:
                first = g * (height // 2) * (width // 2) * GROUP * filters
                _convolve_and_pool(x_g, height, width, channels, w, out + 2 * first, which + first // 4, filters, own)
            else:
                out_g = out + g * height * width * GROUP * filters * 2
                _convolve(x_g, height, width, channels, w, out_g, height, width, filters, own)
        amx.release()


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _unpool(grad, which, height, width, filters, out):  # pragma: no cover
    """The gradient of one group before pooling: [2 * height, 2 * width, M, O]."""
    row = 2 * width * GROUP * filters * 2
    for i in range(height):
        for j in range(width):
            first = (i * width + j) * GROUP * filters
            corner = out + 2 * i * row + 2 * j * GROUP * filters * 2
            for element in range(0, GROUP * filters, 32):
                place = corner + 2 * element
                right = place + GROUP * filters * 2
                source = grad + 2 * (first + element)
                amx.scatter_row(source, which + (first + element) // 4, place, right, place + row, right + row)


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _to_input(
    grad, which, groups, rows, columns, filters, w, out, height, width, channels, pool, blocks, unpooled, parts, tiles
):  # pragma: no cover
    """The gradient of x: a convolution of the output's, `rows` by `columns` before pooling, with turned filters."""
    for part in numba.prange(parts):
        amx.configure(tiles.ctypes.data)
        own, own_grad = blocks + part * BLOCK, unpooled + part * rows * columns * GROUP * filters * 2
        for g in range(part * groups // parts, (part + 1) * groups // parts):
            out_g = out + g * height * width * GROUP * channels * 2
            if pool:
                first = g * (rows // 2) * (columns // 2) * GROUP * filters
                _unpool(grad + 2 * first, which + first // 4, rows // 2, columns // 2, filters, own_grad)
            else:
                own_grad = grad + g * rows * columns * GROUP * filters * 2
            _convolve(own_grad, rows, columns, filters, w, out_g, height, width, channels, own)
        amx.release()


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _pack_grad(grad, which, rows_from, rows_to, width, filters, o, pool, parts, out):  # pragma: no cover
    """32 filters' gradients as left tiles [row, column, 2, 16 filters, 32 images], before pooling."""
    if not pool:
        for i in range(rows_from, rows_to):
            for j in range(width):
                values = grad + ((i * width + j) * GROUP * filters + 32 * o) * 2
                place = out + ((i - rows_from) * width + j) * TILES
                amx.transpose_rows(values, 2 * filters, place)
                amx.transpose_rows(values + 32, 2 * filters, place + 1024)
        return
    for i in range(rows_from // 2, rows_to // 2):
        for j in range(width // 2):
            first = (i * (width // 2) + j) * GROUP * filters + 32 * o
            for m in range(GROUP):
                element = first + m * filters
                p = parts + 64 * m
                amx.scatter_row(grad + 2 * element, which + element // 4, p, p + 2048, p + 4096, p + 6144)
            for part in range(4):
                place = out + ((2 * i + part // 2 - rows_from) * width + 2 * j + part % 2) * TILES
                amx.transpose_rows(parts + 2048 * part, 64, place)
                amx.transpose_rows(parts + 2048 * part + 32, 64, place + 1024)


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _to_filters(
    x,
    groups,
    height,
    width,
    channels,
    grad,
    which,
    rows,
    columns,
    filters,
    pool,
    band,
    out,
    scattered,
    left,
    right,
    parts,
    tiles,
):  # pragma: no cover
    """Into `out` [parts, O / 32, C / 32, 9, 32, 32]: the gradient of w, each part that of its own groups."""
    for part in numba.prange(parts):
        own_scattered = scattered + part * 4 * TILES
        own_left = left + part * band * columns * TILES
        own_right = right + part * (channels // 32) * (band + 2) * width * TILES
        out_p = out + part * filters * channels * 9 * 4
        amx.configure(tiles.ctypes.data)
        for g in range(part * groups // parts, (part + 1) * groups // parts):
            x_g = x + g * height * width * GROUP * channels * 2
            first = g * (rows // 2 * (columns // 2) if pool else rows * columns) * GROUP * filters
            for begin in range(0, rows, band):
                end = min(rows, begin + band)
                top, bottom = max(0, begin - 1), min(height, end + 1)
                size = (bottom - top) * width * TILES
                for c in range(channels // 32):
                    for pixel in range(top * width, bottom * width):
                        place = own_right + c * size + (pixel - top * width) * TILES
                        amx.pair_rows(x_g + (pixel * GROUP * channels + 32 * c) * 2, 2 * channels, place)
                for o in range(filters // 32):
                    _pack_grad(
                        grad + 2 * first,
                        which + first // 4,
                        begin,
                        end,
                        columns,
                        filters,
                        o,
                        pool,
                        own_scattered,
                        own_left,
                    )
                    for c in range(channels // 32):
                        for neighbour in range(9):
                            di, dj = neighbour // 3 - 1, neighbour % 3 - 1
                            block = out_p + ((o * (channels // 32) + c) * 9 + neighbour) * BLOCK
                            if begin == 0 and g == part * groups // parts:
                                amx.clear_block()
                            else:
                                amx.load_block(block)
                            x_from, x_to = max(0, -dj), min(columns, width - dj)
                            for i in range(max(begin, -di), min(end, height - di)):
                                a = own_left + ((i - begin) * columns + x_from) * TILES
                                b = own_right + c * size + ((i + di - top) * width + x_from + dj) * TILES
                                if x_from < x_to:  # an image of one column has no neighbours beside it
                                    amx.multiply_tiles(a, b, x_to - x_from)
                            amx.store_block(block)
        amx.release()
