"""3x3 convolutions of blocked images with 2.25 times fewer multiplications, on x86 processors without a matrix unit.

Winograd's F(2x2, 3x3): 4 x 4 pixels of the input and the nine of a filter are each transformed into 16 numbers, and
2 x 2 pixels of the output are made of their 16 products (`winograd.py`). Those sum over channels, so they are 16
products m = v @ u of matrices, [M, C] of a tile by [C, O]. The gradient of the input is a convolution, too, with turned
filters. That of the filters sums over images and tiles: [O, images] by [images, C]. From Lavin and Gray, Fast
Algorithms for Convolutional Neural Networks, https://arxiv.org/abs/1509.09308.

What is between input and output stays in a core's cache: it is done a tile at a time, or some for the gradient of the
filters. As the images of a group lie side by side at every pixel, transforming them is adding and subtracting rows of
32 C numbers.

Shapes as in `conv_blocked`; a tile is 2 x 2 pixels of the output of a group, E = 16 numbers that it is made of, S
shares of the groups.
"""

# numba changes what its decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false

import math

import numba
import numpy as np
import torch
from torch import Tensor

from fastcifar_kernels import winograd
from fastcifar_kernels.layout import GROUP
from fastcifar_kernels.loops import as_array, narrow, parts_of, widen
from fastcifar_kernels.vectors import LANES, multiply, multiply_more, vector_of
from fastcifar_kernels.winograd import ABOVE, BELOW, FIRST, SECOND, SIGN

# Of transformed input and gradient, of a row of E, that the gradient of the filters sums over at a time: the more, the
# less often its sums are loaded and stored. 0.25 to 2 MB make no difference, with 1 MB of L2 cache a core.
BAND_BYTES = 2**19


def forward(x_GHWMC: Tensor, w_OCHW: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """The output, and which of four pixels was the largest."""
    groups, height, width, _, channels = x_GHWMC.shape
    filters, dtype = len(w_OCHW), x_GHWMC.dtype
    size = (height // 2, width // 2) if pool else (height, width)
    out_GHWMO = torch.empty((groups, *size, GROUP, filters), dtype=dtype)
    which = torch.empty((groups, *size, GROUP, filters // 32, 2) if pool else (0,), dtype=torch.int32)
    u = _transformed(w_OCHW, dtype)
    tiles = math.prod(size) if pool else _tiles(height, width)
    buffers = _buffers(parts_of(groups * tiles), channels, filters, dtype)
    given = x_GHWMC.data_ptr(), groups, height, width, channels, u.data_ptr()
    to = out_GHWMO.data_ptr(), which.data_ptr(), filters, pool
    _forward(vector_of(dtype), dtype.itemsize, *given, *to, *buffers)
    return out_GHWMO, which


def backward(
    x_GHWMC: Tensor, w_OCHW: Tensor, which: Tensor, grad_GHWMO: Tensor, pool: bool, to_input: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x, which is empty unless asked for, and w."""
    groups, height, width, _, channels = x_GHWMC.shape
    _, rows, columns, _, filters = grad_GHWMO.shape
    rows, columns = (2 * rows, 2 * columns) if pool else (rows, columns)
    dtype = x_GHWMC.dtype
    how = vector_of(dtype), dtype.itemsize
    given = grad_GHWMO.data_ptr(), which.data_ptr()
    grad_x_GHWMC = torch.empty((x_GHWMC if to_input else x_GHWMC[:0]).shape, dtype=dtype)
    if to_input:
        u = _transformed(w_OCHW, dtype, turned=True)
        to = grad_x_GHWMC.data_ptr(), height, width, channels, pool
        parts = parts_of(groups * _tiles(height, width))
        unpooled = torch.empty((parts, rows * columns * GROUP * filters if pool else 0), dtype=dtype)
        buffers = *_buffers(parts, filters, channels, dtype), as_array(unpooled)
        _to_input(*how, *given, groups, rows, columns, filters, u.data_ptr(), *to, *buffers)
    # Threads share the groups, and those of a share of them the rows of E: each share has sums of its own, 4 MB for
    # 256 x 256 filters.
    threads = numba.get_num_threads()
    threads_of_a_share = math.gcd(4, threads)
    shares = min(groups, threads // threads_of_a_share)
    parts = shares * threads_of_a_share
    count = max(1, BAND_BYTES // (4 * GROUP * (channels + filters) * dtype.itemsize))
    sides = [torch.empty((parts, 4 * count * GROUP * length), dtype=dtype) for length in (filters, channels)]
    zeros = torch.zeros(GROUP * max(channels, filters), dtype=dtype)
    sums_SEOC = torch.empty((shares, 16, filters, channels))
    shape = groups, height, width, channels, *given, rows, columns, filters, pool
    buffers = as_array(sums_SEOC), count, *map(as_array, sides), np.empty((parts, 8), np.int64)
    _to_filters(*how, x_GHWMC.data_ptr(), *shape, *buffers, zeros.data_ptr())
    grad_w_OHWC = torch.empty((filters, 3, 3, channels), dtype=w_OCHW.dtype)
    _unpack_sums(as_array(sums_SEOC), as_array(grad_w_OHWC))
    return grad_x_GHWMC, grad_w_OHWC.permute(0, 3, 1, 2)


def _transformed(w_OCHW: Tensor, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """See `_pack_filters`."""
    o, c = w_OCHW.shape[1::-1] if turned else w_OCHW.shape[:2]
    lanes, pairs = LANES[dtype], 4 // dtype.itemsize
    out = torch.empty((16, o // lanes, c // pairs, lanes, pairs), dtype=dtype)
    _pack_filters(as_array(w_OCHW.permute(0, 2, 3, 1).contiguous()), turned, as_array(out))
    return out


def _tiles(height: int, width: int) -> int:
    """That cover a map."""
    return (height + 1) // 2 * ((width + 1) // 2)


def _buffers(parts: int, channels: int, filters: int, dtype: torch.dtype) -> list:
    """Memory for every part: a transformed tile, products, addresses, zeros, and for what is beyond the last pixels."""
    image = GROUP * channels
    tile, zeros = torch.empty((parts, 16 * image), dtype=dtype), torch.zeros((parts, image), dtype=dtype)
    products = torch.empty((parts, 16 * GROUP * 2 * LANES[dtype]))
    beyond = torch.empty((parts, GROUP * filters), dtype=dtype)
    return [as_array(tile), as_array(products), np.empty((parts, 8), np.int64), as_array(zeros), as_array(beyond)]


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _four(a, b, c):  # pragma: no cover
    """`G` times three numbers."""
    return a, np.float32(0.5) * (a + b + c), np.float32(0.5) * (a - b + c), c


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _three(a, b, c, d):  # pragma: no cover
    """`G^T` times four numbers."""
    return a + np.float32(0.5) * (b + c), np.float32(0.5) * (b - c), d + np.float32(0.5) * (b + c)


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _neighbour(w_OHWC, turned, o, c, i, j):  # pragma: no cover
    """A number of a filter; or of one for the gradient of x: filters and channels swapped, neighbours in reverse."""
    return widen(w_OHWC[c, 2 - i, 2 - j, o]) if turned else widen(w_OHWC[o, i, j, c])


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _pack_filters(w_OHWC, turned, out):  # pragma: no cover
    """`G filter G^T` as 16 right matrices [E, O / lanes, steps, lanes, 2 or 1]."""
    _, columns, steps, lanes, pairs = out.shape
    for column in numba.prange(columns):
        rows = np.empty((4, 3), np.float32)
        for step in range(steps):
            for lane in range(lanes):
                for pair in range(pairs):
                    which = w_OHWC, turned, column * lanes + lane, step * pairs + pair
                    for j in range(3):
                        rows[0, j], rows[1, j], rows[2, j], rows[3, j] = _four(
                            _neighbour(*which, 0, j), _neighbour(*which, 1, j), _neighbour(*which, 2, j)
                        )
                    for i in range(4):
                        row = _four(rows[i, 0], rows[i, 1], rows[i, 2])
                        for j in range(4):
                            out[4 * i + j, column, step, lane, pair] = narrow(row[j], out[0, 0, 0, 0, 0])


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _unpack_sums(sums_SEOC, out_OHWC):  # pragma: no cover
    """The gradient of the filters, `G^T e G`, of what all shares have summed."""
    filters, _, _, channels = out_OHWC.shape
    for o in numba.prange(filters):
        e, rows = np.empty((4, 4), np.float32), np.empty((3, 4), np.float32)
        for c in range(channels):
            e[:] = 0
            for share in range(len(sums_SEOC)):
                for n in range(16):
                    e[n // 4, n % 4] += sums_SEOC[share, n, o, c]
            for j in range(4):
                rows[0, j], rows[1, j], rows[2, j] = _three(e[0, j], e[1, j], e[2, j], e[3, j])
            for i in range(3):
                row = _three(rows[i, 0], rows[i, 1], rows[i, 2], rows[i, 3])
                for j in range(3):
                    out_OHWC[o, i, j, c] = narrow(row[j], out_OHWC[0, 0, 0, 0])


# numba: x, u ... are addresses, `vector` says what lies there (vectors.py). Every part has a row of each buffer.


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _find_input(x, height, width, pixel, zeros, i, j, k, places):  # pragma: no cover
    """The eight pixels that row k of the transformed tile (i, j) is made of; outside x they are zeros."""
    for number in range(8):
        row = 2 * i - 1 + (FIRST[k] if number < 4 else SECOND[k])
        column = 2 * j - 1 + number % 4
        inside = 0 <= row < height and 0 <= column < width
        places[number] = x + (row * width + column) * pixel if inside else zeros


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _find_output(y, rows, columns, pixel, outside, i, j, places):  # pragma: no cover
    """The four pixels of tile (i, j)."""
    for number in range(4):
        row, column = 2 * i + number // 2, 2 * j + number % 2
        places[number] = y + (row * columns + column) * pixel if row < rows and column < columns else outside


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _share(part, parts, g, groups, tiles):  # pragma: no cover
    """The first tile of group g that is this part's, and the one after its last."""
    first, last = part * groups * tiles // parts - g * tiles, (part + 1) * groups * tiles // parts - g * tiles
    return min(max(first, 0), tiles), min(max(last, 0), tiles)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _convolve(
    vector, size, begin, end, x, height, width, channels, u, filters, out, rows, columns, which, pool,
    v, m, places, zeros, beyond,
):  # fmt: skip  # pragma: no cover
    """Some tiles of a group, one by one: 16 matrices `v`, whose products with two vectors of columns of `u` are `m`."""
    lanes, at = len(vector), places.ctypes.data
    pixel, out_pixel = GROUP * channels * size, GROUP * filters * size
    steps = channels * size // 4
    u_next = steps * lanes * 4  # from one vector of columns to the next
    m_next = GROUP * lanes * 8
    tiles_j = (columns + 1) // 2
    for tile in range(begin, end):
        i, j = tile // tiles_j, tile % tiles_j
        for k in range(4):
            _find_input(x, height, width, pixel, zeros, i, j, k, places)
            winograd.input_to_tiles(vector, at, np.float32(SIGN[k]), GROUP * channels, v + 4 * k * pixel, pixel)
        if not pool:
            _find_output(out, rows, columns, out_pixel, beyond, i, j, places)
        for channel in range(0, filters, 2 * lanes):
            for e in range(16):
                right = u + (e * filters + channel) // lanes * u_next
                for image in range(0, GROUP, lanes // 2):
                    left, to = v + e * pixel + image * channels * size, m + e * m_next + image * lanes * 8
                    multiply(vector, left, channels * size, 4, right, u_next, lanes * 4, steps, to, lanes * 8)
            if pool:
                to, bits = out + tile * out_pixel, which + tile * GROUP * filters // 4
                winograd.tiles_to_largest(vector, m, m_next, GROUP, to, bits, channel, filters)
            else:
                winograd.tiles_to_output(vector, m, m_next, GROUP, at, channel, filters)


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _forward(
    vector, size, x, groups, height, width, channels, u, out, which, filters, pool,
    v_P, m_P, places_P, zeros_P, beyond_P,
):  # fmt: skip  # pragma: no cover
    parts = len(places_P)
    rows, columns = (height // 2 * 2, width // 2 * 2) if pool else (height, width)
    tiles = (rows + 1) // 2 * ((columns + 1) // 2)
    for part in numba.prange(parts):
        for g in range(groups):
            begin, end = _share(part, parts, g, groups, tiles)
            if begin == end:
                continue
            first = g * (rows * columns // 4 if pool else rows * columns) * GROUP * filters
            _convolve(
                vector, size, begin, end, x + g * height * width * GROUP * channels * size, height, width, channels,
                u, filters, out + first * size, rows, columns, which + first // 4, pool,
                v_P[part].ctypes.data, m_P[part].ctypes.data, places_P[part],
                zeros_P[part].ctypes.data, beyond_P[part].ctypes.data,
            )  # fmt: skip


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _unpool(vector, size, grad, which, rows, columns, filters, places, out):  # pragma: no cover
    """The gradient of one group before pooling, [rows, columns, M, O]."""
    length = GROUP * filters
    for tile in range(rows // 2 * (columns // 2)):
        _find_output(out, rows, columns, length * size, 0, tile // (columns // 2), tile % (columns // 2), places)
        winograd.unpool(vector, grad + tile * length * size, which + tile * length // 4, length, places.ctypes.data)


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _to_input(
    vector, size, grad, which, groups, rows, columns, filters, u, out, height, width, channels, pool,
    v_P, m_P, places_P, zeros_P, beyond_P, unpooled_P,
):  # fmt: skip  # pragma: no cover
    """The gradient of x: a convolution of the output's, `rows` by `columns` before pooling, with turned filters."""
    parts = len(places_P)
    tiles = (height + 1) // 2 * ((width + 1) // 2)
    for part in numba.prange(parts):
        for g in range(groups):
            begin, end = _share(part, parts, g, groups, tiles)
            if begin == end:
                continue
            first = g * (rows * columns // 4 if pool else rows * columns) * GROUP * filters
            own, bits = grad + first * size, which + first // 4
            if pool:
                own = unpooled_P[part].ctypes.data
                _unpool(vector, size, grad + first * size, bits, rows, columns, filters, places_P[part], own)
            _convolve(
                vector, size, begin, end, own, rows, columns, filters, u, channels,
                out + g * height * width * GROUP * channels * size, height, width, 0, False,
                v_P[part].ctypes.data, m_P[part].ctypes.data, places_P[part],
                zeros_P[part].ctypes.data, beyond_P[part].ctypes.data,
            )  # fmt: skip


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _to_filters(
    vector, size, x, groups, height, width, channels, grad, which, rows, columns, filters, pool,
    sums_SEOC, count, left_P, right_P, places_P, zeros,
):  # fmt: skip  # pragma: no cover
    """The transformed gradient of the filters, `count` tiles at a time.

    Parts share the groups, and those of a share the rows of E. They go through the same images at the same time, and
    whoever comes first fetches them into the cache that the cores have in common.
    """
    parts, shares = len(places_P), len(sums_SEOC)
    rows_of_a_part = 4 * shares // parts
    tiles = (rows + 1) // 2 * ((columns + 1) // 2)
    for part in numba.prange(parts):
        share = part * shares // parts
        left, right, places = left_P[part].ctypes.data, right_P[part].ctypes.data, places_P[part]
        first, last = share * groups // shares * tiles, (share + 1) * groups // shares * tiles
        for begin in range(first, last, count):
            end = min(last, begin + count)
            for row in range(rows_of_a_part):
                k = (part * rows_of_a_part + row) % 4
                _pack_band(
                    vector, size, x, height, width, channels, grad, which, rows, columns, filters, pool,
                    k, begin, end, count, left, right, places, zeros,
                )  # fmt: skip
                sums = sums_SEOC[share, 4 * k].ctypes.data
                _add_band(vector, size, channels, filters, end - begin, count, left, right, sums, begin > first)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _pack_band(
    vector, size, x, height, width, channels, grad, which, rows, columns, filters, pool,
    k, begin, end, count, left, right, places, zeros,
):  # fmt: skip  # pragma: no cover
    """Row k of transformed tiles from number `begin` on: gradients as four left matrices, the input as right ones."""
    lanes, at = len(vector), places.ctypes.data
    sign, above, below = np.float32(SIGN[k]), np.float32(ABOVE[k]), np.float32(BELOW[k])
    pixel, out_pixel = GROUP * channels * size, GROUP * filters * size
    tile_bytes = GROUP * lanes * size  # of one vector of columns
    tiles_j = (columns + 1) // 2
    tiles = (rows + 1) // 2 * tiles_j
    left_next, right_next = count * GROUP * filters * size, count * GROUP * channels * size
    for number in range(begin, end):
        g, i, j = number // tiles, number % tiles // tiles_j, number % tiles % tiles_j
        offset = (number - begin) * tile_bytes
        _find_input(x + g * height * width * pixel, height, width, pixel, zeros, i, j, k, places)
        for c in range(0, channels, lanes):
            to = right + c // lanes * count * tile_bytes + offset
            winograd.input_to_columns(vector, at, sign, c, GROUP, to, right_next, channels)
        if not pool:
            _find_output(grad + g * rows * columns * out_pixel, rows, columns, out_pixel, zeros, i, j, places)
        for o in range(0, filters, lanes):
            to = left + o // lanes * count * tile_bytes + offset
            if pool:
                bits = which + number * GROUP * filters // 4
                winograd.pooled_grad_to_columns(
                    vector, grad + number * out_pixel, bits, above, below, o, GROUP, to, left_next, filters
                )
            else:
                winograd.grad_to_columns(vector, at, above, below, o, GROUP, to, left_next, filters)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _add_band(vector, size, channels, filters, tiles, count, left, right, sums, more):  # pragma: no cover
    """Four products of what `_pack_band` has left, added to `sums` if there are `more`."""
    lanes = len(vector)
    steps = tiles * GROUP * size // 4
    next_columns = count * GROUP * lanes * size
    for e in range(4):
        for c in range(0, channels, 2 * lanes):
            columns = right + (e * channels + c) // lanes * next_columns
            for o in range(0, filters, lanes // 2):
                rows = left + (e * filters + o) // lanes * next_columns + o % lanes * 4
                to = sums + ((e * filters + o) * channels + c) * 4
                how = rows, 4, lanes * 4, columns, next_columns, lanes * 4, steps, to, channels * 4
                if more:
                    multiply_more(vector, *how)
                else:
                    multiply(vector, *how)
