"""Winograd's transformations for numba loops: F(4x4, 3x3), of images that lie side by side.

    output = A^T ((G filter G^T) * (B^T input B)) A        4 x 4 = ((6 x 6) * (6 x 6)), product by product

multiply polynomials by their values at 0, p, -p, q, -q and infinity:

           1    0    0    0              1      0     0              1    0  -5/2   0    1    0
           1    p   1/2  p/2           -2/3  -2p/3  -1/3             0  -2p   -2    p    1    0
    A =    1   -p   1/2 -p/2     G =   -2/3   2p/3  -1/3     B^T =   0   2p   -2   -p    1    0      p = sqrt(1/2)
           1    q    2   2q             1/6    q/6   1/3             0  -q/2 -1/2   q    1    0      q = sqrt(2)
           1   -q    2  -2q             1/6   -q/6   1/3             0   q/2 -1/2  -q    1    0
           0    0    0    1              0      0     1              0    1    0  -5/2   0    1

With what is multiplied rounded to bfloat16, results are off by 1.2 % of their size; with the usual 1 and 2 for p and q,
by 2.5 %. Of everything six long, or six by six, the rows of p and -p are a sum and a difference, and so are those of q
and -q: they are computed together.

See `vectors.py` for what the functions take.
"""

from collections.abc import Callable, Iterator
from itertools import product

from llvmlite import ir

from fastcifar_kernels.vectors import I64, Code, function

TILE, EDGE = 4, 6  # pixels of the output and of the input along a side
ROOTS = {1: 0.5**0.5, 2: 2.0**0.5}  # p and q, by the number of their group: 0, p and -p, q and -q, infinity
SCALES = {1: -2 / 3, 2: 1 / 6}  # of their rows of G


@function
def filters_to_columns(code, filters, neighbour, pair, out, out_next):
    """`G filter G^T` of a vector of filters as a step of 36 right matrices, `out_next` apart.

    A filter's nine numbers are float32 and `neighbour` apart, and it is `pair` to those of the next channel.
    """

    def numbers(channel: int):
        start = code.at(filters, code.times(pair, channel))
        return lambda i, j: code.read(code.at(start, code.times(neighbour, 3 * i + j)), code.wide)

    tiles = [_transformed(code, numbers(channel), 3, _filter_rows) for channel in range(_together(code))]
    for number, value in enumerate(_steps(code, tiles)):
        code.write(value, code.at(out, code.times(out_next, number)))


@function
def sums_to_filters(code, sums, sums_next, length, out, out_next):
    """`G^T e G`: from 36 times `length` numbers, to nine times as many; all float32."""
    with code.repeat(code.builder.udiv(length, ir.Constant(I64, code.lanes))) as turn:
        offset = code.times(turn, 4 * code.lanes)
        e = [code.read(code.at(sums, offset, code.times(sums_next, n)), code.wide) for n in range(EDGE * EDGE)]
        for number, value in enumerate(_folded(code, e, _filter_gradient)):
            code.write(value, code.at(out, offset, code.times(out_next, number)))


@function
def input_to_tiles(code, pixels, length, out, out_next):
    """`B^T x B` as 36 times `length` numbers, `out_next` apart. At `pixels` stand the addresses of 6 x 6 pixels."""
    code = code.of_whole_lines()
    with code.repeat(code.builder.udiv(length, ir.Constant(I64, code.lanes))) as turn:
        offset = code.times(turn, code.lanes * code.size)
        for number, value in enumerate(_transformed(code, _pixels(code, pixels, EDGE, offset), EDGE, _input_rows)):
            code.write(code.narrowed(value), code.at(out, offset, code.times(out_next, number)))


@function
def pooled_grad_to_tiles(code, pixels, length, out, out_next):
    """The same of a gradient that of each 2 x 2 pixels only the largest has: see `tiles_to_largest`.

    At `pixels` stand the addresses of 4 x 4 pixels, and of what tells which was the largest. The 6 x 6 are all of the
    inner ones, and those neighbours of the outer ones.
    """
    code = code.of_whole_lines()
    with code.repeat(code.builder.udiv(length, ir.Constant(I64, code.lanes))) as turn:
        first = code.times(turn, code.lanes)
        offset = code.times(first, code.size)
        value, which = _pixels(code, pixels, TILE, offset), _addresses(code, code.at(pixels, 8 * TILE * TILE), TILE)
        x = {}
        for i, j in product(range(TILE), repeat=2):
            x |= _scattered(code, value(i, j), which(i, j), first, 2 * i - 1, 2 * j - 1)
        for number, some in enumerate(_transformed(code, lambda i, j: x[i, j], EDGE, _input_rows)):
            code.write(code.narrowed(some), code.at(out, offset, code.times(out_next, number)))


@function
def input_to_columns(code, pixels, channel, channels, images, outs, out_next):
    """The same of a vector of channels, as steps of right matrices whose columns they are: they sum over images.

    At `outs` stands where the matrices begin: all but those of the last row and column, those of the last column, those
    of the last row, and that of both.
    """

    def tile(image):
        offset = code.times(code.at(code.times(image, channels), channel), code.size)
        return _transformed(code, _pixels(code, pixels, EDGE, offset), EDGE, _input_rows)

    _write_columns(code, tile, images, outs, out_next)


@function
def grad_to_columns(code, pixels, channel, channels, images, outs, out_next):
    """`A y A^T`, otherwise the same. At `pixels` stand the addresses of 4 x 4 pixels."""

    def tile(image):
        offset = code.times(code.at(code.times(image, channels), channel), code.size)
        return _transformed(code, _pixels(code, pixels, TILE, offset), TILE, _grad_rows)

    _write_columns(code, tile, images, outs, out_next)


@function
def pooled_grad_to_columns(code, pixels, channel, channels, images, outs, out_next):
    """The same where of 2 x 2 pixels only the largest has a gradient: see `tiles_to_largest`."""
    which = _addresses(code, code.at(pixels, 8 * 4), 2)

    def tile(image):
        first = code.at(code.times(image, channels), channel)
        value, y = _pixels(code, pixels, 2, code.times(first, code.size)), {}
        for i, j in product(range(2), repeat=2):
            y |= _scattered(code, value(i, j), which(i, j), first, 2 * i, 2 * j)
        return _transformed(code, lambda i, j: y[i, j], TILE, _grad_rows)

    _write_columns(code, tile, images, outs, out_next)


@function
def tiles_to_output(code, tiles, tiles_next, images, pixels, channel, channels):
    """`A^T m A`: from 36 matrices [images, 2 * lanes], to 4 x 4 pixels."""
    with code.repeat(images) as image:
        for half in range(2):
            offset = code.times(code.at(code.times(image, channels), channel, half * code.lanes), code.size)
            for number, pixel in enumerate(_output(code, tiles, tiles_next, image, half)):
                place = code.read(code.at(pixels, 8 * number), I64)
                code.write(code.narrowed(pixel), code.at(place, offset))


@function
def tiles_to_largest(code, tiles, tiles_next, images, pixels, channel, channels):
    """The same, but of each 2 x 2 pixels only the largest, to the first four addresses at `pixels`.

    Which it was stands in two bits at the next four. 64 bits tell it for 32 channels: the first 32, was it one of the
    lower two, the others, one of the right two.
    """
    builder = code.builder
    places = code.addresses(pixels, 8)
    with code.repeat(images) as image:
        for half in range(2):
            first = code.at(code.times(image, channels), channel, half * code.lanes)
            y = _output(code, tiles, tiles_next, image, half)
            for number, (place, which) in enumerate(zip(places[:4], places[4:], strict=True)):
                start = 2 * TILE * (number // 2) + 2 * (number % 2)
                above_left, above_right, below_left, below_right = (y[start + n] for n in (0, 1, TILE, TILE + 1))
                right_above, right_below = (
                    builder.fcmp_ordered(">", right, left)
                    for right, left in ((above_right, above_left), (below_right, below_left))
                )
                above = builder.select(right_above, above_right, above_left)
                below = builder.select(right_below, below_right, below_left)
                lower = builder.fcmp_ordered(">", below, above)
                right = builder.select(lower, right_below, right_above)
                largest = builder.select(lower, below, above)
                code.write(code.narrowed(largest), code.at(place, code.times(first, code.size)))
                for to, bits in zip(_places_of_bits(code, which, first), (lower, right), strict=True):
                    code.write(builder.bitcast(bits, ir.IntType(code.lanes)), to)


# Of a column of numbers, given one by one on demand, the rows of a group (see ROOTS) of their transform.


def _input_rows(code: Code, x: Callable, group: int) -> list:
    """Of `B^T x`."""
    if group in (0, 3):
        first = group // 3
        return [code.multiply_add(code.number(-2.5), x(first + 2), code.add(x(first), x(first + 4)))]
    root = ROOTS[group]
    even = code.multiply_add(code.number(-1 / root**2), x(2), x(4))
    odd = code.multiply_add(code.number(-1 / root**2), x(1), x(3))
    return [code.multiply_add(code.number(sign * root), odd, even) for sign in (1, -1)]


def _grad_rows(code: Code, y: Callable, group: int) -> list:
    """Of `A y`."""
    if group in (0, 3):
        return [y(group)]
    root = ROOTS[group]
    even = code.multiply_add(code.number(root**2), y(2), y(0))
    odd = code.multiply_add(code.number(root**2), y(3), y(1))
    return [code.multiply_add(code.number(sign * root), odd, even) for sign in (1, -1)]


def _filter_rows(code: Code, w: Callable, group: int) -> list:
    """Of `G w`."""
    if group in (0, 3):
        return [w(2 * group // 3)]
    root, scale = ROOTS[group], SCALES[group]
    even = code.multiply(code.number(scale), code.multiply_add(code.number(root**2), w(2), w(0)))
    middle = w(1)
    return [code.multiply_add(code.number(sign * scale * root), middle, even) for sign in (1, -1)]


def _transformed(code: Code, value: Callable, size: int, some_rows: Callable) -> Iterator:
    """The 36 numbers of `size` by `size`, row by row; `value(i, j)` is one of those."""
    columns = []
    for column in range(size):
        numbers = [value(row, column) for row in range(size)]
        columns.append([number for group in range(4) for number in some_rows(code, numbers.__getitem__, group)])
    for row in zip(*columns, strict=True):
        for group in range(4):
            yield from some_rows(code, row.__getitem__, group)


# And the other way round.


def _output_column(code: Code, m: list) -> list:
    """`A^T m`."""
    (p, q), (sum_p, less_p), (sum_q, less_q) = ROOTS.values(), *_sums_and_differences(code, m)
    return [
        code.add(m[0], sum_p, sum_q),
        code.multiply_add(code.number(p), less_p, code.multiply(code.number(q), less_q)),
        code.multiply_add(code.number(p**2), sum_p, code.multiply(code.number(q**2), sum_q)),
        code.multiply_add(code.number(p**3), less_p, code.multiply_add(code.number(q**3), less_q, m[5])),
    ]


def _filter_gradient(code: Code, e: list) -> list:
    """`G^T e`."""
    (p, q), (scale_p, scale_q) = ROOTS.values(), SCALES.values()
    (sum_p, less_p), (sum_q, less_q) = _sums_and_differences(code, e)
    above = code.multiply_add(code.number(scale_p), sum_p, code.multiply_add(code.number(scale_q), sum_q, e[0]))
    middle = code.multiply_add(code.number(scale_p * p), less_p, code.multiply(code.number(scale_q * q), less_q))
    below = code.multiply_add(
        code.number(scale_p * p**2), sum_p, code.multiply_add(code.number(scale_q * q**2), sum_q, e[5])
    )
    return [above, middle, below]


def _sums_and_differences(code: Code, numbers: list) -> list:
    """Of the rows of p and -p, and of q and -q."""
    return [(code.add(one, other), code.subtract(one, other)) for one, other in (numbers[1:3], numbers[3:5])]


def _folded(code: Code, numbers: list, column: Callable) -> list:
    """Of 36 numbers, what `column` makes of columns and then of rows."""
    columns = [column(code, numbers[start::EDGE]) for start in range(EDGE)]
    return [value for row in zip(*columns, strict=True) for value in column(code, list(row))]


def _output(code: Code, tiles, tiles_next, image, half: int) -> list:
    start = code.at(tiles, code.times(image, 8 * code.lanes), 4 * code.lanes * half)
    m = [code.read(code.at(start, code.times(tiles_next, number)), code.wide) for number in range(EDGE * EDGE)]
    return _folded(code, m, _output_column)


# Memory


def _pixels(code: Code, pixels, side: int, offset) -> Callable:
    """A vector of pixel (i, j), of those of side x side, whose addresses stand at `pixels`."""
    address = _addresses(code, pixels, side)
    return lambda i, j: code.load(code.at(address(i, j), offset))


def _addresses(code: Code, places, side: int) -> Callable:
    """That of pixel (i, j), of those of side x side, which stand at `places`."""
    return lambda i, j: code.read(code.at(places, 8 * (side * i + j)), I64)


def _together(code: Code) -> int:
    """How many numbers a step is made of."""
    return 2 if code.bfloat16 else 1


def _steps(code: Code, tiles: list[Iterator]) -> Iterator:
    """The numbers of a transformed tile, or of two in pairs."""
    for values in zip(*tiles, strict=True):
        yield code.narrowed_pairs(*values) if code.bfloat16 else values[0]


def _write_columns(code: Code, tile: Callable, images, outs, out_next) -> None:
    """Vectors of channels of each image, `tile(image)`, as steps of right matrices: see `input_to_columns`."""
    places = code.addresses(outs, 4)
    together = _together(code)
    with code.repeat(code.builder.udiv(images, ir.Constant(I64, together))) as step:
        tiles = [tile(code.at(code.times(step, together), image)) for image in range(together)]
        for number, value in enumerate(_steps(code, tiles)):
            place = places[2 * (number // EDGE == EDGE - 1) + (number % EDGE == EDGE - 1)]
            code.write(value, code.at(place, code.times(step, 4 * code.lanes), code.times(out_next, number)))


def _places_of_bits(code: Code, which, first):
    """Where the bits of a vector stand, whose first number is this one."""
    words = code.times(code.builder.udiv(first, ir.Constant(I64, 32)), 8)
    byte = code.builder.udiv(code.builder.urem(first, ir.Constant(I64, 32)), ir.Constant(I64, 8))
    return code.at(which, words, byte), code.at(which, words, byte, 4)


def _scattered(code: Code, value, which, first, i: int, j: int) -> dict:
    """2 x 2 vectors from pixel (i, j) on: `value` where the bits say so, 0 in the other three."""
    builder, zeros = code.builder, code.zeros(value.type)
    kind, mask = ir.IntType(code.lanes), ir.VectorType(ir.IntType(1), code.lanes)
    lower, right = (builder.bitcast(code.read(place, kind), mask) for place in _places_of_bits(code, which, first))
    found = {}
    for row, half in enumerate((builder.select(lower, zeros, value), builder.select(lower, value, zeros))):
        found[i + row, j] = builder.select(right, zeros, half)
        found[i + row, j + 1] = builder.select(right, half, zeros)
    return found
