"""Nearest points of lattices, compiled.

A unit of columns x with importance w and scale e is nearest to the point g of least

    sum w (x - e g)^2 = C - 2 e A + e^2 B,    C = sum w x^2,  A = sum w x g,  B = sum w g^2.

A and B know nothing of the scale: they are computed once for every point, B even once for all rows, and then a
scale is tried at two operations a point. Where the signs are stored beside a point of positive coordinates, they
are those of x. Where the number of minus signs must be even and that of x is odd, one sign is wrong; the cheapest
costs 4 e min w |x| g, so A becomes A - 2 min w |x| g, and the search is still exact.
"""

# mypy: disallow-untyped-defs=False

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from poise.kernels import finite, inlined

Floats = npt.NDArray[np.float32]
Points = npt.NDArray[np.int8]

NONE, FREE, EVEN = 0, 1, 2
"""Signs are in the points; are stored for every column; are stored for every column but one, and even in number."""

FAR = np.float32(1e6)
"""Farther than this, in units of the scale, all is outside the lattice alike."""

# Everything the loops see is finite: blocks are normalised, and what cannot be is settled before.
loop: Any = finite
inline: Any = inlined


class Shape(NamedTuple):
    """How the points of a lattice make up weights.

    Attributes:
        points: [dimensions, points]; bytes, as the largest table would not stay in the first-level cache as floats.
        shifts: of all coordinates; which of them is chosen for a group, or for a point where they are ``mixed``.
        mixed: whether points of a group may be shifted differently; the shift is then above the index.
        unit: columns of a code; a multiple of the dimensions, so that a code may hold several points.
        signs: ``NONE``, ``FREE`` or ``EVEN``.
        bits: of a point's index, with its shift.
        group: columns that share s.
        step: e = d (2 s + 1) step.
        top: the largest s.
    """

    points: Points
    shifts: Floats
    mixed: bool
    unit: int
    signs: int
    bits: int
    group: int
    step: np.float32
    top: int


def instruction(function: Any) -> Any:
    """What writes LLVM instructions; the typing context comes before its arguments."""
    return intrinsic(function)


@instruction
def _order(typing: Any, value: Any) -> Any:
    """The bits of a float32 as int32: the same order, for positive numbers."""
    return types.int32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.IntType(32)
    )


@instruction
def _unless_less(typing: Any, left: Any, right: Any, value: Any) -> Any:
    """``2147483647 if left < right else value`` for positive numbers, in arithmetic: a branch would stay a branch."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32 = ir.IntType(32)
        sign = builder.ashr(builder.sub(arguments[0], arguments[1]), ir.Constant(i32, 31))
        return builder.or_(builder.and_(sign, ir.Constant(i32, 2147483647)), arguments[2])

    return types.int32(types.int32, types.int32, types.int32), generate


@loop
def project(weighted, odd, points, scores):
    """scores[part, 0, k] = A of a part of the unit, scores[part, 1, k] that with one sign wrong, if the unit is odd.

    weighted is w x, or w |x|; four dimensions at a time.
    """
    for part in range(scores.shape[0]):
        right, wrong = scores[part, 0], scores[part, 1]
        right[:] = 0
        if odd:
            wrong[:] = np.float32(3e38)
        for j in range(0, points.shape[0], 4):
            i = part * points.shape[0] + j
            w0, w1, w2, w3 = weighted[i], weighted[i + 1], weighted[i + 2], weighted[i + 3]
            p0, p1, p2, p3 = points[j], points[j + 1], points[j + 2], points[j + 3]
            if odd:
                for k in range(right.shape[0]):
                    a, b, c, d = w0 * p0[k], w1 * p1[k], w2 * p2[k], w3 * p3[k]
                    right[k] += (a + b) + (c + d)
                    b, d = (a if a < b else b), (c if c < d else d)
                    d = b if b < d else d
                    wrong[k] = d if d < wrong[k] else wrong[k]
            else:
                for k in range(right.shape[0]):
                    right[k] += (w0 * p0[k] + w1 * p1[k]) + (w2 * p2[k] + w3 * p3[k])
        if odd:
            for k in range(right.shape[0]):
                wrong[k] = right[k] - np.float32(2) * wrong[k]


@loop
def nearest(a, b, c, order):
    """The first point of least error at scale 1."""
    least = where = np.int32(2147483647)
    for k in range(a.shape[0]):
        score = _order(c + (b[k] - np.float32(2) * a[k]))
        order[k] = score
        least = score if score < least else least
    for k in range(a.shape[0]):
        here = _unless_less(least, order[k], np.int32(k))
        where = here if here < where else where
    return where


@loop
def signed(x, weights, signs, weighted):
    """Fills weighted with w x, or with w |x| where signs are stored; returns the bits of the signs, C, and sum w x.

    C is a little too large, so that rounding never makes an error negative.
    """
    bits, square, total = 0, np.float32(0), np.float32(0)
    for j in range(x.shape[0]):
        product = weights[j] * x[j]
        square += product * x[j]
        total += product
        if signs != NONE and product < 0:
            bits |= 1 << j
            product = -product
        weighted[j] = product
    return bits, square * np.float32(1.0001) + np.float32(1e-20), total


@loop
def is_odd(bits):
    bits ^= bits >> 4
    bits ^= bits >> 2
    return ((bits ^ bits >> 1) & 1) == 1


@loop
def squares(weights, points, shifts, b):
    """b[variant, part, k] = sum_j w_j (g_kj + shift)^2."""
    b[:] = 0
    dimensions = points.shape[0]
    for variant in range(b.shape[0]):
        for part in range(b.shape[1]):
            for j in range(dimensions):
                weight, row, target = weights[part * dimensions + j], points[j], b[variant, part]
                for k in range(row.shape[0]):
                    value = row[k] + shifts[variant]
                    target[k] += weight * value * value


@loop
def cheapest(weighted, points, part, k):
    """The column whose wrong sign costs least."""
    best, where = np.float32(3e38), 0
    for j in range(points.shape[0]):
        cost = weighted[part * points.shape[0] + j] * points[j, k]
        if cost < best:
            best, where = cost, part * points.shape[0] + j
    return where


@inline
def choose_way(choice, odd, parts):
    """(whether a sign is wrong, which shift) of a part's first or second choice."""
    if odd:
        return (choice, 0) if parts > 1 else (1, 0)
    return 0, choice


@inline
def line_of(part, choice, k, total, odd, scores, shifts, b):
    """(A, B) of a part that is point k."""
    way, shift = choose_way(choice, odd, scores.shape[0])
    return scores[part, way, k] + shifts[shift] * total, b[shift, part, k]


@inline
def second_part(e, found, total, odd, scores, shifts, b):
    """The part whose second choice is taken, -1 for none. In an odd unit of two parts it is exactly one."""
    where, best = -1, np.float32(3e38) if odd else np.float32(0)
    for part in range(scores.shape[0]):
        a0, b0 = line_of(part, 0, found[part, 0], total, odd, scores, shifts, b)
        a1, b1 = line_of(part, 1, found[part, 1], total, odd, scores, shifts, b)
        more = e * (b1 - b0) - 2 * (a1 - a0)
        if more < best:
            where, best = part, more
    return where


@loop
def nearest_codes(weight, importance, scale, variant, shape):
    """Codes int32 [rows, units] of the nearest points: indices of the parts, then signs, from the lowest bit up.

    Args:
        weight: [rows, columns].
        importance: [columns], positive, at most 1 in every unit.
        scale, variant: [rows, units], or one for a row.
    """
    rows, columns = weight.shape
    points, unit = shape.points, shape.unit
    dimensions, count = points.shape
    parts = unit // dimensions
    kept = unit - 1 if shape.signs == EVEN else unit
    codes = np.zeros((rows, columns // unit), dtype=np.int32)
    b = np.zeros((shape.shifts.shape[0], parts, count), dtype=np.float32)
    scores = np.zeros((parts, 2, count), dtype=np.float32)
    x, weighted = np.zeros(unit, dtype=np.float32), np.zeros(unit, dtype=np.float32)
    found, order = np.zeros((parts, 2), dtype=np.int64), np.zeros(count, dtype=np.int32)
    wide = scale.shape[1] > 1
    for place in range(columns // unit):
        first = place * unit
        here = importance[first : first + unit]
        squares(here, points, shape.shifts, b)
        for row in range(rows):
            e, v = scale[row, place if wide else 0], variant[row, place if wide else 0]
            for j in range(unit):
                y = weight[row, first + j] / e if e != 0 else np.float32(0)
                x[j] = max(-FAR, min(FAR, y))
            bits, square, total = signed(x, here, shape.signs, weighted)
            odd = shape.signs == EVEN and is_odd(bits)
            project(weighted, odd, points, scores)
            last = shape.shifts.shape[0] if shape.mixed else v + 1
            shifts, norms = shape.shifts[v:last], b[v:last]
            choices = 2 if odd and parts > 1 else shifts.shape[0]
            for part in range(parts):
                for choice in range(choices):
                    way, shift = choose_way(choice, odd, parts)
                    moved = np.float32(2) * shifts[shift] * total
                    found[part, choice] = nearest(
                        scores[part, way], norms[shift, part], square - moved, order
                    )
            second = (
                second_part(np.float32(1), found, total, odd, scores, shifts, norms) if choices > 1 else -1
            )
            code = 0
            for part in range(parts):
                way, shift = choose_way(1 if part == second else 0, odd, parts)
                k = found[part, 1 if part == second else 0]
                code |= (k + shift * count) << part * shape.bits
                if way == 1:
                    bits ^= 1 << cheapest(weighted, points, part, k)
            codes[row, place] = code | (bits & (1 << kept) - 1) << parts * shape.bits
    return codes
