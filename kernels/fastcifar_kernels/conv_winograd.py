"""3x3 convolutions of blocked images with four times fewer multiplications, on x86 processors.

Winograd's F(4x4, 3x3): 6 x 6 pixels of the input and the nine of a filter are each transformed into 36 numbers, and
4 x 4 pixels of the output are made of their 36 products (`winograd.py`). Those sum over channels, so they are 36
products m = v @ u of matrices, [M, C] of a tile by [C, O]. The gradient of the input is a convolution, too, with turned
filters. That of the filters sums over images and tiles: [O, images] by [images, C]. From Lavin and Gray, Fast
Algorithms for Convolutional Neural Networks, https://arxiv.org/abs/1509.09308.

The first and last row and column of the 36 count for the first and last of four pixels alone, and are left out where
those are not needed: a map of 7 x 7 takes 11 x 11 products, not 12 x 12, one of 5 x 5 10 x 10 (`_span`).

What is between input and output stays in a core's cache: it is done a tile at a time, or some for the gradient of the
filters. As the images of a group lie side by side at every pixel, transforming them is arithmetic on rows of
32 C numbers.

Products are vectors' (`vectors.py`), or in bfloat16, but for the gradient of the filters, a matrix unit's (`amx.py`).

Shapes as in `conv_blocked`; a tile is 4 x 4 pixels of the output of a group, E = 36 numbers that it is made of.
"""

# numba changes what its decorators wrap:
# pyright: reportCallIssue=false, reportArgumentType=false

import numba
import numpy as np
import torch
from torch import Tensor

from fastcifar_kernels import amx, winograd
from fastcifar_kernels.layout import GROUP
from fastcifar_kernels.loops import as_array, parts_of
from fastcifar_kernels.vectors import LANES, clear, multiply, multiply_more, vector_of
from fastcifar_kernels.winograd import EDGE, TILE

E = EDGE * EDGE
# Of transformed input and gradient, that the gradient of the filters sums over at a time: its sums are loaded and
# stored once for each. Few sums, every thread has for itself, with a band that stays in its part of the cache: where
# threads shared them, they took twice as long on cores that share no cache (64 filters of 32 channels 86 instead of 38
# ms). Many, they share, with a band that leaves the cache as these do anyway: in 64 MB instead of 8, 256 filters of as
# many channels, 9 MB of sums, take 65 ms instead of 77, 2,048 of them 516 instead of 1,306.
BAND_BYTES, LONG_BAND_BYTES = 2**21, 2**26
MANY_SUMS_BYTES = 6e6
# Between matrices of neighbouring numbers of E: at distances of 4096 bytes they would share a place in the cache.
GAP_BYTES = 64


def forward(x_GHWMC: Tensor, w_OCHW: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """The output, and which of four pixels was the largest."""
    groups, height, width, _, channels = x_GHWMC.shape
    filters, dtype = len(w_OCHW), x_GHWMC.dtype
    size = (height // 2, width // 2) if pool else (height, width)
    out_GHWMO = torch.empty((groups, *size, GROUP, filters), dtype=dtype)
    which = torch.empty((groups, *size, GROUP, filters // 32, 2) if pool else (0,), dtype=torch.int32)
    u = _transformed(w_OCHW, dtype)
    rows, columns = (2 * size[0], 2 * size[1]) if pool else size
    buffers = _buffers(parts_of(groups * _tiles(rows, columns)), channels, filters, dtype)
    given = x_GHWMC.data_ptr(), groups, height, width, channels, u.data_ptr()
    to = out_GHWMO.data_ptr(), rows, columns, which.data_ptr(), filters, pool
    _forward(vector_of(dtype), dtype.itemsize, *given, *to, *buffers)
    return out_GHWMO, which


def to_input(w_OCHW: Tensor, which: Tensor, grad_GHWMO: Tensor, pool: bool, height: int, width: int) -> Tensor:
    """The gradient of x, which has so many rows and columns."""
    groups, rows, columns, _, filters = grad_GHWMO.shape
    rows, columns = (2 * rows, 2 * columns) if pool else (rows, columns)
    channels, dtype = w_OCHW.size(1), grad_GHWMO.dtype
    grad_x_GHWMC = torch.empty((groups, height, width, GROUP, channels), dtype=dtype)
    u = _transformed(w_OCHW, dtype, turned=True)
    given = grad_GHWMO.data_ptr(), which.data_ptr(), rows, columns, filters, pool, u.data_ptr()
    to = grad_x_GHWMC.data_ptr(), groups, height, width, channels
    buffers = _buffers(parts_of(groups * _tiles(height, width)), filters, channels, dtype)
    _to_input(vector_of(dtype), dtype.itemsize, *given, *to, *buffers)
    return grad_x_GHWMC


def to_filters(x_GHWMC: Tensor, w_OCHW: Tensor, which: Tensor, grad_GHWMO: Tensor, pool: bool) -> Tensor:
    """The gradient of w."""
    groups, height, width, _, channels = x_GHWMC.shape
    _, rows, columns, _, filters = grad_GHWMO.shape
    rows, columns = (2 * rows, 2 * columns) if pool else (rows, columns)
    of_input = x_GHWMC.data_ptr(), groups, height, width, channels
    of_output = grad_GHWMO.data_ptr(), which.data_ptr(), rows, columns, filters, pool
    together = E * filters * channels * 4 > MANY_SUMS_BYTES
    buffers = _bands(groups * _tiles(rows, columns), channels, filters, x_GHWMC.dtype, together)
    sums_PEOC = torch.empty((len(buffers[-1]), E, filters, channels))
    how = vector_of(x_GHWMC.dtype), x_GHWMC.dtype.itemsize
    _to_filters(*how, *of_input, *of_output, together, as_array(sums_PEOC), *buffers)
    sums_EOC = sums_PEOC[0] if len(sums_PEOC) == 1 else sums_PEOC.sum(dim=0)
    grad_w_OHWC = torch.empty((filters, 3, 3, channels))
    _unpack_sums(vector_of(torch.float32), sums_EOC.data_ptr(), filters, channels, grad_w_OHWC.data_ptr())
    return grad_w_OHWC.to(w_OCHW.dtype).permute(0, 3, 1, 2)


def _transformed(w_OCHW: Tensor, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """The filters as 36 right matrices [E, O / lanes, steps, lanes, 2 or 1].

    For the gradient of x they are `turned`: filters and channels exchanged, the nine neighbours in reverse.
    """
    w_CHWO = w_OCHW.float().permute((0, 2, 3, 1) if turned else (1, 2, 3, 0)).contiguous()
    c, _, _, o = w_CHWO.shape
    out = torch.empty((E, o // LANES[dtype], c * LANES[dtype]), dtype=dtype)
    _pack_filters(vector_of(dtype), dtype.itemsize, w_CHWO.data_ptr(), c, o, turned, out.data_ptr())
    return out


def _tiles(rows: int, columns: int) -> int:
    """That cover a map."""
    return -(-rows // TILE) * -(-columns // TILE)


def _buffers(parts: int, channels: int, filters: int, dtype: torch.dtype) -> list:
    """Memory for every part: a transformed tile, products, addresses, zeros, and for what is beyond the last pixels.

    Last what configures a matrix unit. Without one it is None, and numba leaves out what is for it.
    """
    tile = _matrices(GROUP * channels, dtype, parts)
    products = _matrices(GROUP * 2 * LANES[dtype], torch.float32, parts)
    zeros = torch.zeros((parts, GROUP * channels), dtype=dtype)
    beyond = torch.empty((parts, GROUP * filters), dtype=dtype)
    places = np.empty((parts, E), np.int64)
    amx_tiles = amx.WHOLE_TILES if amx.runs(tile) else None
    return [as_array(tile), as_array(products), places, as_array(zeros), as_array(beyond), amx_tiles]


def _bands(tiles: int, channels: int, filters: int, dtype: torch.dtype, together: bool) -> list:
    """Memory for `_to_filters`: one row for all parts `together`, or one for each of them, of a band of tiles."""
    parts = 1 if together else parts_of(tiles)
    band_bytes = LONG_BAND_BYTES if together else BAND_BYTES
    count = min(-(-tiles // parts), max(1, band_bytes // (E * GROUP * (channels + filters) * dtype.itemsize)))
    # Of one tile more, for what no product needs.
    left, right = (_matrices((count + 1) * GROUP * length, dtype, parts) for length in (filters, channels))
    zeros = torch.zeros((1, GROUP * max(channels, filters)), dtype=dtype)
    places = np.empty((parts, count * (channels + filters) // 32, E + 4), np.int64)
    slots = np.empty((parts, count + 1, 4), np.int64)
    return [as_array(left), as_array(right), as_array(zeros), places, slots]


def _matrices(numbers: int, dtype: torch.dtype, parts: int = 1) -> Tensor:
    """Memory for E matrices of so many numbers, one for every part."""
    return torch.empty((parts, E * (numbers + GAP_BYTES // dtype.itemsize)), dtype=dtype)


# numba: x, u ... are addresses, `vector` says what lies there (vectors.py), `size` how many bytes a number has. Every
# part has a row of each buffer.


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _pack_filters(vector, size, w, channels, filters, turned, out):  # pragma: no cover
    """See `_transformed`."""
    lanes, together = len(vector), 4 // size
    steps = channels // together
    neighbour = filters * 4
    for column in numba.prange(filters // lanes):
        for step in range(steps):
            first = w + step * together * 9 * neighbour + column * lanes * 4
            first, way = (first + 8 * neighbour, -neighbour) if turned else (first, neighbour)
            to = out + (column * steps + step) * lanes * 4
            winograd.filters_to_columns(vector, first, way, 9 * neighbour, to, channels * filters * size)


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _unpack_sums(vector, sums, filters, channels, out):  # pragma: no cover
    """The gradient of the filters, [O, 3, 3, C], of the sums of products, [E, O, C]; all float32."""
    length = channels * 4
    for o in numba.prange(filters):
        winograd.sums_to_filters(vector, sums + o * length, filters * length, channels, out + o * 9 * length, length)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _find(image, rows, columns, pixel, outside, top, left, side, places):  # pragma: no cover
    """The addresses of `side` by `side` pixels from (top, left) on."""
    for i in range(side):
        for j in range(side):
            inside = 0 <= top + i < rows and 0 <= left + j < columns
            places[i * side + j] = image + ((top + i) * columns + left + j) * pixel if inside else outside


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _share(part, parts, g, groups, tiles):  # pragma: no cover
    """The first tile of group g that is this part's, and the one after its last."""
    first, last = part * groups * tiles // parts - g * tiles, (part + 1) * groups * tiles // parts - g * tiles
    return min(max(first, 0), tiles), min(max(last, 0), tiles)


@numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")
def _span(start, size, given, pooled):  # pragma: no cover
    """Where a tile begins, and the rows of products that it needs; `start` is its first of `size` rows of the output.

    The last of six counts for its last pixel alone, the first for its first. So a tile of one or two pixels begins one
    pixel earlier, where nothing is pooled, and needs neither. If of the input, which has `given` rows, only the first
    is inside, as below a gradient that was pooled from an odd map, the others are made of zeros.
    """
    if start == given:
        return start, 0, 1
    if start + 2 >= size and not pooled:
        return start - 1, 1, EDGE - 1
    return start, 0, EDGE if start + TILE <= size else EDGE - 1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _convolve(
    vector, size, begin, end, x, x_which, height, width, channels, u, filters, out, which, rows, columns,
    v, m, places, zeros, beyond, amx_tiles,
):  # fmt: skip  # pragma: no cover
    """Some tiles of a group, one by one: 36 matrices `v`, whose products with two vectors of columns of `u` are `m`.

    Of what has been pooled, `height` and `width`, or `rows` and `columns`, are from before, and there is a `which`; of
    other maps it is np.int64(0), as numba would compile all this anew for a 0.
    """
    lanes, at = len(vector), places.ctypes.data
    pixel, bits_pixel = GROUP * channels * size, GROUP * channels // 4
    out_pixel, out_bits_pixel = GROUP * filters * size, GROUP * filters // 4
    v_next, m_next = pixel + GAP_BYTES, GROUP * lanes * 8 + GAP_BYTES
    steps = channels * size // 4
    u_next = steps * lanes * 4  # from one vector of columns to the next
    tiles_j = (columns + TILE - 1) // TILE
    for tile in range(begin, end):
        i, e_i, e_rows = _span(tile // tiles_j * TILE, rows, height, x_which or which)
        j, e_j, e_columns = _span(tile % tiles_j * TILE, columns, width, x_which or which)
        if x_which:
            _find(x, height // 2, width // 2, pixel, zeros, i // 2 - 1, j // 2 - 1, 4, places)
            _find(x_which, height // 2, width // 2, bits_pixel, zeros, i // 2 - 1, j // 2 - 1, 4, places[16:])
            winograd.pooled_grad_to_tiles(vector, at, GROUP * channels, v, v_next)
        else:
            _find(x, height, width, pixel, zeros, i - 1, j - 1, EDGE, places)
            winograd.input_to_tiles(vector, at, GROUP * channels, v, v_next)
        if which:
            _find(out, rows // 2, columns // 2, out_pixel, beyond, i // 2, j // 2, 2, places)
            _find(which, rows // 2, columns // 2, out_bits_pixel, beyond, i // 2, j // 2, 2, places[4:])
        else:
            _find(out, rows, columns, out_pixel, beyond, i, j, TILE, places)
            for number in range(TILE):  # a row or column that is of the tile before
                places[number] = beyond if e_i else places[number]
                places[TILE * number] = beyond if e_j else places[TILE * number]
        if e_rows == 1 or e_columns == 1:
            clear(vector, m, E * m_next)  # the products that are not needed are 0
        for channel in range(0, filters, 2 * lanes):
            for e_row in range(e_i, e_rows):
                for e in range(EDGE * e_row + e_j, EDGE * e_row + e_columns):
                    right = u + (e * filters + channel) // lanes * u_next
                    if amx_tiles is not None:
                        left, row = v + e * v_next, channels * size
                        amx.clear_block()
                        amx.multiply_rows(left, left + 16 * row, row, right, right + u_next, channels // 32)
                        amx.store_block(m + e * m_next)
                        continue
                    for image in range(0, GROUP, lanes // 2):
                        left, to = v + e * v_next + image * channels * size, m + e * m_next + image * lanes * 8
                        multiply(vector, left, channels * size, 4, right, u_next, lanes * 4, steps, to, lanes * 8)
            if which:
                winograd.tiles_to_largest(vector, m, m_next, GROUP, at, channel, filters)
            else:
                winograd.tiles_to_output(vector, m, m_next, GROUP, at, channel, filters)


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _forward(
    vector, size, x, groups, height, width, channels, u, out, rows, columns, which, filters, pool,
    v_P, m_P, places_P, zeros_P, beyond_P, amx_tiles,
):  # fmt: skip  # pragma: no cover
    """The output: `rows` by `columns` before pooling."""
    parts = len(places_P)
    tiles = (rows + TILE - 1) // TILE * ((columns + TILE - 1) // TILE)
    for part in numba.prange(parts):
        if amx_tiles is not None:
            amx.configure(amx_tiles.ctypes.data)
        for g in range(groups):
            begin, end = _share(part, parts, g, groups, tiles)
            if begin == end:
                continue
            first = g * (rows * columns // 4 if pool else rows * columns) * GROUP * filters
            _convolve(
                vector, size, begin, end, x + g * height * width * GROUP * channels * size, np.int64(0), height, width,
                channels, u, filters, out + first * size, which + first // 4 if pool else 0, rows, columns,
                v_P[part].ctypes.data, m_P[part].ctypes.data, places_P[part],
                zeros_P[part].ctypes.data, beyond_P[part].ctypes.data, amx_tiles,
            )  # fmt: skip
        if amx_tiles is not None:
            amx.release()


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _to_input(
    vector, size, grad, which, rows, columns, filters, pool, u, out, groups, height, width, channels,
    v_P, m_P, places_P, zeros_P, beyond_P, amx_tiles,
):  # fmt: skip  # pragma: no cover
    """The gradient of x: a convolution of the output's, `rows` by `columns` before pooling, with turned filters."""
    parts = len(places_P)
    tiles = (height + TILE - 1) // TILE * ((width + TILE - 1) // TILE)
    for part in numba.prange(parts):
        if amx_tiles is not None:
            amx.configure(amx_tiles.ctypes.data)
        for g in range(groups):
            begin, end = _share(part, parts, g, groups, tiles)
            if begin == end:
                continue
            first = g * (rows * columns // 4 if pool else rows * columns) * GROUP * filters
            _convolve(
                vector, size, begin, end, grad + first * size, which + first // 4 if pool else 0, rows, columns,
                filters, u, channels, out + g * height * width * GROUP * channels * size, np.int64(0), height, width,
                v_P[part].ctypes.data, m_P[part].ctypes.data, places_P[part],
                zeros_P[part].ctypes.data, beyond_P[part].ctypes.data, amx_tiles,
            )  # fmt: skip
        if amx_tiles is not None:
            amx.release()


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _to_filters(
    vector, size, x, groups, height, width, channels, grad, which, rows, columns, filters, pool, together, sums_PEOC,
    left_P, right_P, zeros_1, places_PU, slots_PN4,
):  # fmt: skip  # pragma: no cover
    """The transformed gradient of the filters, of a band of tiles at a time: they are transformed, then multiplied."""
    parts, count = len(slots_PN4), slots_PN4.shape[1] - 1
    tiles_j = (columns + TILE - 1) // TILE
    tiles = (rows + TILE - 1) // TILE * tiles_j
    packs, products = (channels + filters) // 32, E * filters // 32  # of a tile; of a band
    if together:
        for begin in range(0, groups * tiles, count):
            end = min(groups * tiles, begin + count)
            _find_slots(begin, end, tiles, tiles_j, rows, columns, slots_PN4[0])
            for unit in numba.prange((end - begin) * packs):
                _pack(
                    vector, size, x, height, width, channels, grad, which, rows, columns, filters, pool, begin, tiles,
                    tiles_j, unit, left_P[0], right_P[0], slots_PN4[0], places_PU[0], zeros_1,
                )  # fmt: skip
            for unit in numba.prange(products):
                _add_products(
                    vector, size, unit, channels, filters, left_P[0], right_P[0], slots_PN4[0], sums_PEOC[0], begin > 0
                )
    else:
        for part in numba.prange(parts):
            first, last = part * groups * tiles // parts, (part + 1) * groups * tiles // parts
            for begin in range(first, last, count):
                end = min(last, begin + count)
                _find_slots(begin, end, tiles, tiles_j, rows, columns, slots_PN4[part])
                for unit in range((end - begin) * packs):
                    _pack(
                        vector, size, x, height, width, channels, grad, which, rows, columns, filters, pool, begin,
                        tiles, tiles_j, unit, left_P[part], right_P[part], slots_PN4[part], places_PU[part], zeros_1,
                    )  # fmt: skip
                for unit in range(products):
                    _add_products(
                        vector, size, unit, channels, filters, left_P[part], right_P[part], slots_PN4[part],
                        sums_PEOC[part], begin > first,
                    )  # fmt: skip


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _pack(
    vector, size, x, height, width, channels, grad, which, rows, columns, filters, pool, begin, tiles, tiles_j, unit,
    left, right, slots_N4, places_U, zeros_1,
):  # fmt: skip  # pragma: no cover
    """Of a band that begins with this tile, 32 channels of the transformed input, or 32 filters of the gradient."""
    count, packs, zeros = len(slots_N4) - 1, (channels + filters) // 32, zeros_1.ctypes.data
    tile, block = unit // packs, unit % packs
    g, i, j = (begin + tile) // tiles, (begin + tile) % tiles // tiles_j, (begin + tile) % tiles % tiles_j
    if block < channels // 32:
        _pack_input(
            vector, size, x + g * height * width * GROUP * channels * size, height, width, channels,
            i, j, 32 * block, right.ctypes.data, count, slots_N4[tile], places_U[unit], zeros,
        )  # fmt: skip
    else:
        _pack_grad(
            vector, size, grad, which, g, rows, columns, filters, pool,
            i, j, 32 * block - channels, left.ctypes.data, count, slots_N4[tile], places_U[unit], zeros,
        )  # fmt: skip


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _find_slots(begin, end, tiles, tiles_j, rows, columns, slots_N4):  # pragma: no cover
    """Where each tile stands among those that have what is summed; the others share a place behind them all.

    By turns: anything; a last column, of 4; a last row; both. Last how many tiles have it.
    """
    used_4, behind = slots_N4[-1], len(slots_N4) - 1
    used_4[:] = 0
    for number in range(begin, end):
        i, j = number % tiles // tiles_j, number % tiles % tiles_j
        below, right = TILE * i + TILE <= rows, TILE * j + TILE <= columns
        for what in range(4):
            has = (below or what < 2) and (right or what % 2 == 0)
            slots_N4[number - begin, what] = used_4[what] if has else behind
            used_4[what] += has


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _find_columns(matrices, channel, channels, lanes, count, size, slots, places):  # pragma: no cover
    """Where the columns of these channels stand in the matrices of each kind; how far it is to the next of E."""
    tile_bytes = GROUP * lanes * size
    for what in range(4):
        places[what] = matrices + (channel // lanes * (count + 1) + slots[what]) * tile_bytes
    return channels // lanes * (count + 1) * tile_bytes + GAP_BYTES


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _pack_input(
    vector, size, x, height, width, channels, i, j, channel, right, count, slots, places, zeros
):  # fmt: skip  # pragma: no cover
    """32 channels of the transformed input of a tile, as columns of right matrices."""
    _find(x, height, width, GROUP * channels * size, zeros, TILE * i - 1, TILE * j - 1, EDGE, places)
    at = places.ctypes.data
    for c in range(channel, channel + 32, len(vector)):
        right_next = _find_columns(right, c, channels, len(vector), count, size, slots, places[E:])
        winograd.input_to_columns(vector, at, c, channels, GROUP, at + 8 * E, right_next)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _pack_grad(
    vector, size, grad, which, g, rows, columns, filters, pool, i, j, channel, left, count, slots, places, zeros
):  # fmt: skip  # pragma: no cover
    """32 channels of the transformed gradient of a tile, as rows of left matrices."""
    at, pixel, bits_pixel = places.ctypes.data, GROUP * filters * size, GROUP * filters // 4
    if pool:
        rows, columns = rows // 2, columns // 2
        before = g * rows * columns
        _find(grad + before * pixel, rows, columns, pixel, zeros, 2 * i, 2 * j, 2, places)
        _find(which + before * bits_pixel, rows, columns, bits_pixel, zeros, 2 * i, 2 * j, 2, places[4:])
    else:
        _find(grad + g * rows * columns * pixel, rows, columns, pixel, zeros, TILE * i, TILE * j, TILE, places)
    for o in range(channel, channel + 32, len(vector)):
        left_next = _find_columns(left, o, filters, len(vector), count, size, slots, places[E:])
        if pool:
            winograd.pooled_grad_to_columns(vector, at, o, filters, GROUP, at + 8 * E, left_next)
        else:
            winograd.grad_to_columns(vector, at, o, filters, GROUP, at + 8 * E, left_next)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _add_products(
    vector, size, unit, channels, filters, left_1, right_1, slots_N4, sums_EOC, more
):  # fmt: skip  # pragma: no cover
    """32 filters of one of E products of what `_pack` has made, added to the sums if there are `more`."""
    count, lanes = len(slots_N4) - 1, len(vector)
    e, first = unit // (filters // 32), unit % (filters // 32) * 32
    steps = slots_N4[count, 2 * (e // EDGE == EDGE - 1) + (e % EDGE == EDGE - 1)] * GROUP * size // 4
    next_columns = (count + 1) * GROUP * lanes * size
    left = left_1.ctypes.data + e * (filters // lanes * next_columns + GAP_BYTES)
    right = right_1.ctypes.data + e * (channels // lanes * next_columns + GAP_BYTES)
    for c in range(0, channels, 2 * lanes):
        columns = right + c // lanes * next_columns
        for o in range(first, first + 32, lanes // 2):
            rows = left + o // lanes * next_columns + o % lanes * 4
            to = sums_EOC.ctypes.data + ((e * filters + o) * channels + c) * 4
            how = rows, 4, lanes * 4, columns, next_columns, lanes * 4, steps, to, channels * 4
            if more:
                multiply_more(vector, *how)
            else:
                multiply(vector, *how)
