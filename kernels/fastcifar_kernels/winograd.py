"""Winograd's transformations for numba loops: F(2x2, 3x3), of images that lie side by side.

    output = A^T ((G filter G^T) * (B^T input B)) A        2 x 2 = ((4 x 4) * (4 x 4)), product by product

           1  0                1    0    0               1  0 -1  0
    A =    1  1       G =    1/2  1/2  1/2      B^T =    0  1  1  0
           1 -1              1/2 -1/2  1/2               0 -1  1  0
           0 -1                0    0    1               0  1  0 -1

What is 4 x 4 is made and stored a row at a time, number by number. See `vectors.py` for what the functions take.
"""

from llvmlite import ir

from fastcifar_kernels.vectors import I64, Code, function

# Of row k of `B^T x`: row FIRST[k] of x, plus SIGN[k] times row SECOND[k].
FIRST, SECOND, SIGN = (0, 1, 2, 1), (2, 2, 1, 3), (-1, 1, -1, -1)
# Of row k of `A y`: row 0 of y times ABOVE[k], plus row 1 times BELOW[k].
ABOVE, BELOW = (1, 1, 1, 0), (0, 1, -1, -1)


@function
def input_to_tiles(code, pixels, sign, length, out, out_next):
    """A row of `B^T x B`, as four times `length` numbers, `out_next` apart.

    At `pixels` stand eight addresses: of four pixels of one row of x, and of another one, which counts `sign` times.
    """
    places = code.addresses(pixels, 8)
    with code.repeat(code.builder.udiv(length, ir.Constant(I64, code.lanes))) as turn:
        offset = code.times(turn, code.lanes * code.size)
        row = _input_row(code, [code.load(code.at(place, offset)) for place in places], sign)
        for number, value in enumerate(row):
            code.write(code.narrowed(value), code.at(out, offset, code.times(out_next, number)))


@function
def input_to_columns(code, pixels, sign, channel, images, out, out_next, channels):
    """The same of a vector of channels, as steps of a right matrix whose columns they are: it sums over images."""
    places = code.addresses(pixels, 8)

    def row(image):
        offset = code.times(code.at(code.times(image, channels), channel), code.size)
        return _input_row(code, [code.load(code.at(place, offset)) for place in places], sign)

    _write_columns(code, row, images, out, out_next)


@function
def grad_to_columns(code, pixels, above, below, channel, images, out, out_next, channels):
    """A row of `A y A^T`, otherwise the same. At `pixels` stand four addresses, of 2 x 2 pixels."""
    places = code.addresses(pixels, 4)

    def row(image):
        offset = code.times(code.at(code.times(image, channels), channel), code.size)
        return _grad_row(code, [code.load(code.at(place, offset)) for place in places], above, below)

    _write_columns(code, row, images, out, out_next)


@function
def pooled_grad_to_columns(code, grad, which, above, below, channel, images, out, out_next, channels):
    """The same where only the largest of 2 x 2 pixels has a gradient: see `tiles_to_largest`."""

    select, zeros = code.builder.select, code.zeros(code.wide)

    def row(image):
        first = code.at(code.times(image, channels), channel)
        lower, right = _read_bits(code, which, first)
        factor = select(lower, code.splat(below), code.splat(above))
        value = code.builder.fmul(factor, code.load(code.at(grad, code.times(first, code.size))))
        minus = code.builder.fneg(value)
        return [select(right, zeros, value), value, select(right, minus, value), select(right, minus, zeros)]

    _write_columns(code, row, images, out, out_next)


@function
def unpool(code, grad, which, length, pixels):
    """`length` numbers to those of 2 x 2 pixels that they belong to, 0 to the others."""
    places = code.addresses(pixels, 4)
    with code.repeat(code.builder.udiv(length, ir.Constant(I64, code.lanes))) as turn:
        first = code.times(turn, code.lanes)
        offset = code.times(first, code.size)
        value = code.read(code.at(grad, offset), code.narrow)
        for place, part in zip(places, _scattered(code, value, which, first), strict=True):
            code.write(part, code.at(place, offset))


@function
def tiles_to_output(code, tiles, tiles_next, images, pixels, channel, channels):
    """`A^T m A`: from 16 matrices [images, 2 * lanes], to 2 x 2 pixels."""
    places = code.addresses(pixels, 4)
    with code.repeat(images) as image:
        for half in range(2):
            first = code.at(code.times(image, channels), channel, half * code.lanes)
            offset = code.times(first, code.size)
            for place, pixel in zip(places, _output(code, tiles, tiles_next, image, half), strict=True):
                code.write(code.narrowed(pixel), code.at(place, offset))


@function
def tiles_to_largest(code, tiles, tiles_next, images, out, which, channel, channels):
    """The same, but of 2 x 2 pixels only the largest. Which it was stands in two bits of `which`.

    64 bits tell it for 32 channels: the first 32, was it one of the lower two, the others, one of the right two.
    """
    builder = code.builder
    with code.repeat(images) as image:
        for half in range(2):
            first = code.at(code.times(image, channels), channel, half * code.lanes)
            pixels = _output(code, tiles, tiles_next, image, half)
            above_right, below_right = (builder.fcmp_ordered(">", pixels[n + 1], pixels[n]) for n in (0, 2))
            above = builder.select(above_right, pixels[1], pixels[0])
            below = builder.select(below_right, pixels[3], pixels[2])
            lower = builder.fcmp_ordered(">", below, above)
            right = builder.select(lower, below_right, above_right)
            largest = builder.select(lower, below, above)
            code.write(code.narrowed(largest), code.at(out, code.times(first, code.size)))
            for place, bits in zip(_places_of_bits(code, which, first), (lower, right), strict=True):
                code.write(builder.bitcast(bits, ir.IntType(code.lanes)), place)


def _input_row(code: Code, pixels: list, sign) -> list:
    factor = code.splat(sign)
    a, b, c, d = (code.multiply_add(factor, pixels[4 + n], pixels[n]) for n in range(4))
    return [code.subtract(a, c), code.add(b, c), code.subtract(c, b), code.subtract(b, d)]


def _grad_row(code: Code, pixels: list, above, below) -> list:
    a, b = code.splat(above), code.splat(below)
    left, right = (code.multiply_add(b, pixels[2 + n], code.builder.fmul(a, pixels[n])) for n in range(2))
    return [left, code.add(left, right), code.subtract(left, right), code.builder.fneg(right)]


def _write_columns(code: Code, row, images, out, out_next) -> None:
    """Vectors of channels of each image (`row`), as steps of a right matrix."""
    together = 2 if code.bfloat16 else 1
    with code.repeat(code.builder.udiv(images, ir.Constant(I64, together))) as step:
        found = [row(code.at(code.times(step, together), image)) for image in range(together)]
        for number, values in enumerate(zip(*found, strict=True)):
            value = code.narrowed_pairs(*values) if code.bfloat16 else values[0]
            code.write(value, code.at(out, code.times(step, 4 * code.lanes), code.times(out_next, number)))


def _output(code: Code, tiles, tiles_next, image, half: int) -> list:
    start = code.at(tiles, code.times(image, 8 * code.lanes), 4 * code.lanes * half)
    m = [code.read(code.at(start, code.times(tiles_next, number)), code.wide) for number in range(16)]
    above = [code.add(m[n], m[4 + n], m[8 + n]) for n in range(4)]
    below = [code.subtract(m[4 + n], m[8 + n], m[12 + n]) for n in range(4)]
    return [pixel for a, b, c, d in (above, below) for pixel in (code.add(a, b, c), code.subtract(b, c, d))]


def _places_of_bits(code: Code, which, first):
    """Where the bits of a vector stand, whose first number is this one."""
    words = code.times(code.builder.udiv(first, ir.Constant(I64, 32)), 8)
    byte = code.builder.udiv(code.builder.urem(first, ir.Constant(I64, 32)), ir.Constant(I64, 8))
    return code.at(which, words, byte), code.at(which, words, byte, 4)


def _read_bits(code: Code, which, first) -> list:
    kind, mask = ir.IntType(code.lanes), ir.VectorType(ir.IntType(1), code.lanes)
    return [code.builder.bitcast(code.read(place, kind), mask) for place in _places_of_bits(code, which, first)]


def _scattered(code: Code, value, which, first) -> list:
    """2 x 2 vectors: `value` where the bits say so, 0 in the other three."""
    builder, zeros = code.builder, code.zeros(value.type)
    lower, right = _read_bits(code, which, first)
    halves = builder.select(lower, zeros, value), builder.select(lower, value, zeros)
    return [
        part for half in halves for part in (builder.select(right, zeros, half), builder.select(right, half, zeros))
    ]
