"""Nearest points of lattices and the scales that suit them, compiled.

A unit of columns x with importance w and scale e is nearest to the point g of least

    sum w (x - e g)^2 = C - 2 e A + e^2 B,    C = sum w x^2,  A = sum w x g,  B = sum w g^2.

A and B know nothing of the scale: they are computed once for every point, B even once for all rows, and then a
scale is tried at two operations a point. Where the signs are stored beside a point of positive coordinates, they
are those of x. Where the number of minus signs must be even and that of x is odd, one sign is wrong; the cheapest
costs 4 e min w |x| g, so A becomes A - 2 min w |x| g, and the search is still exact.

``fit_scales`` chooses the two levels of scales of a block, e = d (2 s + 1) step. For each group it tries scales of
every size; each try leaves a line (A, B), the sums over the group's nearest points. The group's error at any scale
is then the least of C - 2 e A + e^2 B over its lines: exact at the scales that were tried, and hardly above it
between them. So hundreds of pairs of d and s are compared without touching the weights again.
"""

# mypy: disallow-untyped-defs=False

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Floats = npt.NDArray[np.float32]
Points = npt.NDArray[np.int8]

NONE, FREE, EVEN = 0, 1, 2
"""Signs are in the points; are stored for every column; are stored for every column but one, and even in number."""

BATCH = 4
"""Scales that are tried at once."""
BLOCK = 256
TRIES = 48
"""Values of d tried besides those that suit the largest group."""
POLISH = 6
"""Repetitions of (least-squares d, best s)."""
TINY, HUGE = np.float32(1e-20), np.float32(1e12)
"""Blocks of smaller magnitude are zero, of larger magnitude refused: no format of float16 scales reaches so far."""
LEAST = 2.0**-24
"""The smallest float16."""
SMALL = np.float32(1 / 256)
"""The least root mean square of a group that scales are tried for, relative to the block's largest magnitude."""
FAR = np.float32(1e6)
"""Farther than this, in units of the scale, all is outside the lattice alike."""

# Everything the loops see is finite: blocks are normalised, and what cannot be is settled before.
loop = njit(nogil=True, cache=True, error_model="numpy", fastmath=True)


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


def _instruction(function: Any) -> Any:
    """What writes LLVM instructions; the typing context comes before its arguments."""
    return intrinsic(function)


@_instruction
def _order(typing: Any, value: Any) -> Any:
    """The bits of a float32 as int32: the same order, for positive numbers."""
    return types.int32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.IntType(32)
    )


@_instruction
def _tagged(typing: Any, value: Any, mask: Any, tag: Any) -> Any:
    """``_order(value) & mask | tag``, which numba would do in 64 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        return builder.or_(builder.and_(bits, arguments[1]), arguments[2])

    return types.int32(types.float32, types.int32, types.int32), generate


@_instruction
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
def _nearest_four(a, b, c, moved, scales, first, index, found):
    """found[:4] = points of (almost) least error at four scales, if all A are moved by half of ``moved``.

    The index is kept in the lowest bits of the error, which are lost to the comparison.
    """
    e0, e1, e2, e3 = scales[first], scales[first + 1], scales[first + 2], scales[first + 3]
    c0, c1, c2, c3 = c / e0 - moved, c / e1 - moved, c / e2 - moved, c / e3 - moved
    mask, two = np.int32(~index), np.float32(2)
    m0 = m1 = m2 = m3 = np.int32(2147483647)
    for k in range(a.shape[0]):
        slope, square, tag = two * a[k], b[k], np.int32(k)
        s0 = _tagged(e0 * square + (c0 - slope), mask, tag)
        s1 = _tagged(e1 * square + (c1 - slope), mask, tag)
        s2 = _tagged(e2 * square + (c2 - slope), mask, tag)
        s3 = _tagged(e3 * square + (c3 - slope), mask, tag)
        m0 = s0 if s0 < m0 else m0
        m1 = s1 if s1 < m1 else m1
        m2 = s2 if s2 < m2 else m2
        m3 = s3 if s3 < m3 else m3
    found[0], found[1], found[2], found[3] = m0 & index, m1 & index, m2 & index, m3 & index


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
def _half(value):
    """The nearest float16, as a float; 1e30 beyond."""
    if value <= 0:
        return np.float32(0)
    _, exponent = math.frexp(value)
    quantum = math.ldexp(1.0, max(exponent - 11, -24))
    rounded = np.rint(value / quantum) * quantum
    return np.float32(rounded) if rounded <= 65504 else np.float32(1e30)


@loop
def _measure(x, importance, mean):
    """The largest magnitude of a block, 0 where every float16 scale is too large for it.

    Fills mean with the weighted root mean square of each group, relative to the largest magnitude; it stays large enough
    to divide by, as next to nothing the smallest scale will do.
    """
    size = np.float32(0)
    for j in range(BLOCK):
        size = max(size, abs(x[j]))
    if size < TINY or size > HUGE:
        return np.float32(0) if size < TINY else size
    group = BLOCK // mean.shape[0]
    for g in range(mean.shape[0]):
        total, square = np.float32(0), np.float32(0)
        for j in range(g * group, (g + 1) * group):
            part = x[j] / size
            total += importance[j]
            square += importance[j] * part * part
        mean[g] = max(np.sqrt(square / total), SMALL)
    return size


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
def cheapest(weighted, points, part, k):
    """The column whose wrong sign costs least."""
    best, where = np.float32(3e38), 0
    for j in range(points.shape[0]):
        cost = weighted[part * points.shape[0] + j] * points[j, k]
        if cost < best:
            best, where = cost, part * points.shape[0] + j
    return where


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
def _choice(choice, odd, parts):
    """(whether a sign is wrong, which shift) of a part's first or second choice."""
    if odd:
        return (choice, 0) if parts > 1 else (1, 0)
    return 0, choice


@loop
def _line(part, choice, k, total, odd, scores, shifts, b):
    """(A, B) of a part that is point k."""
    way, shift = _choice(choice, odd, scores.shape[0])
    return scores[part, way, k] + shifts[shift] * total, b[shift, part, k]


@loop
def _second(e, found, total, odd, scores, shifts, b):
    """The part whose second choice is taken, -1 for none. In an odd unit of two parts it is exactly one."""
    where, best = -1, np.float32(3e38) if odd else np.float32(0)
    for part in range(scores.shape[0]):
        a0, b0 = _line(part, 0, found[part, 0], total, odd, scores, shifts, b)
        a1, b1 = _line(part, 1, found[part, 1], total, odd, scores, shifts, b)
        more = e * (b1 - b0) - 2 * (a1 - a0)
        if more < best:
            where, best = part, more
    return where


@loop
def _add_lines(square, total, odd, scores, shifts, b, scales, found, line_a, line_b):
    """Adds A and B of one unit's nearest points at every scale to its group's lines."""
    parts, index = scores.shape[0], np.int32(scores.shape[2] - 1)
    choices = 2 if odd and parts > 1 else shifts.shape[0]
    for first in range(0, scales.shape[0], BATCH):
        for part in range(parts):
            for choice in range(choices):
                way, shift = _choice(choice, odd, parts)
                moved, target = np.float32(2) * shifts[shift] * total, found[:, part, choice]
                _nearest_four(scores[part, way], b[shift, part], square, moved, scales, first, index, target)
        for i in range(BATCH):
            t, second = first + i, -1
            if choices > 1:
                second = _second(scales[t], found[i], total, odd, scores, shifts, b)
            for part in range(parts):
                choice = 1 if part == second else 0
                more_a, more_b = _line(part, choice, found[i, part, choice], total, odd, scores, shifts, b)
                line_a[t] += more_a
                line_b[t] += more_b


@loop
def _assign(d, best, start, pitch, odds, line_a, line_b, s, line):
    """Every group's best s and line, as [variant, try], for a given d; returns the error, less the constant."""
    top, last = odds.shape[0] - 1, line_a.shape[2] - 1
    total, level = 0.0, math.log(d)
    for group in range(best.shape[0]):
        below = max(0, min(int((best[group] / d - 1) / 2), top - 1))
        least = 1e30
        for candidate in range(below, below + 2):
            e = d * (2 * candidate + 1)
            near = int(max(0.0, min(float(last), (level + odds[candidate] - start[group]) / pitch)))
            for variant in range(line_a.shape[1]):
                for t in range(near, min(near + 1, last) + 1):
                    error = e * (e * line_b[group, variant, t] - 2 * line_a[group, variant, t])
                    if error < least:
                        least, s[group] = error, candidate
                        line[group, 0], line[group, 1] = variant, t
        total += least
    return total


@loop
def _choose(size, step, start, pitch, odds, line_a, line_b, best, s, line, trial_s, trial_line):
    """d of least error, leaving s and line of every group; the d that would be needed if float16 cannot hold it.

    Tried are: the d that gives the group of the largest scale the exact one, for every s it could have; a
    geometric range of d; and the least-squares d of the best choice so far, a few times over.
    """
    top, largest = odds.shape[0] - 1, 0.0
    for group in range(best.shape[0]):
        gain = 0.0
        best[group] = 0
        for variant in range(line_a.shape[1]):
            for t in range(line_a.shape[2]):
                a, b = float(line_a[group, variant, t]), float(line_b[group, variant, t])
                if a > 0 and a * a > gain * b:
                    gain, best[group] = a * a / b, a / b
        largest = max(largest, best[group])
    chosen, least = 0.0, 0.0
    s[:] = 0
    line[:] = 0
    for trial in range(top + 1 + TRIES + POLISH):
        if trial <= top:
            wanted = largest / (2 * trial + 1)
        elif trial <= top + TRIES:
            wanted = largest / (2 * top + 1) * 0.9 * 2.4 ** ((trial - top) / TRIES)
        else:
            a, b = 0.0, 0.0
            for group in range(best.shape[0]):
                a += (2 * s[group] + 1) * line_a[group, line[group, 0], line[group, 1]]
                b += (2 * s[group] + 1) ** 2 * line_b[group, line[group, 0], line[group, 1]]
            wanted = a / b
        half = max(_half(wanted / step * size), LEAST)
        if half > 65504:
            continue
        error = _assign(half / size * step, best, start, pitch, odds, line_a, line_b, trial_s, trial_line)
        if error < least:
            chosen, least = half, error
            s[:] = trial_s
            line[:] = trial_line
    needed = largest / (2 * top + 1) / step * size
    return np.float32(needed if needed >= 65520 else chosen)


@loop
def fit_scales(weight, importance, shape, ratios):
    """(d float32 [rows, blocks], s and variant uint8 [rows, groups]); d is too large where float16 cannot hold it.

    Args:
        weight: [rows, columns].
        importance: [columns], positive, at most 1.
        ratios: geometric, a multiple of ``BATCH``; scales that are tried, relative to a group's root mean square.
    """
    rows, columns = weight.shape
    dimensions, count = shape.points.shape
    unit, group, tries = shape.unit, shape.group, ratios.shape[0]
    groups, parts = BLOCK // group, unit // dimensions
    variants = 1 if shape.mixed else shape.shifts.shape[0]
    d = np.zeros((rows, columns // BLOCK), dtype=np.float32)
    s = np.zeros((rows, columns // group), dtype=np.uint8)
    variant = np.zeros((rows, columns // group), dtype=np.uint8)
    size, mean = np.zeros(rows, dtype=np.float32), np.zeros((rows, groups), dtype=np.float32)
    line_a = np.zeros((rows, groups, variants, tries), dtype=np.float32)
    line_b = np.zeros((rows, groups, variants, tries), dtype=np.float32)
    b = np.zeros((shape.shifts.shape[0], parts, count), dtype=np.float32)
    scores = np.zeros((parts, 2, count), dtype=np.float32)
    found = np.zeros((BATCH, parts, 2), dtype=np.int32)
    x, weighted = np.zeros(unit, dtype=np.float32), np.zeros(unit, dtype=np.float32)
    best, start = np.zeros(groups), np.zeros(groups)
    best_s, trial_s = np.zeros(groups, dtype=np.int64), np.zeros(groups, dtype=np.int64)
    line, trial_line = np.zeros((groups, 2), dtype=np.int64), np.zeros((groups, 2), dtype=np.int64)
    odds = np.log(2.0 * np.arange(shape.top + 1) + 1)
    pitch = math.log(ratios[1] / ratios[0])
    for block in range(columns // BLOCK):
        first = block * BLOCK
        for row in range(rows):
            size[row] = _measure(
                weight[row, first : first + BLOCK], importance[first : first + BLOCK], mean[row]
            )
            if size[row] > HUGE:
                d[row, block], size[row] = size[row], 0
        line_a[:] = 0
        line_b[:] = 0
        for place in range(0, BLOCK, unit):
            here = importance[first + place : first + place + unit]
            squares(here, shape.points, shape.shifts, b)
            for row in range(rows):
                if size[row] == 0:
                    continue
                for j in range(unit):
                    x[j] = weight[row, first + place + j] / size[row]
                scales = mean[row, place // group] * ratios
                bits, square, total = signed(x, here, shape.signs, weighted)
                odd = shape.signs == EVEN and is_odd(bits)
                project(weighted, odd, shape.points, scores)
                for v in range(variants):
                    last = shape.shifts.shape[0] if shape.mixed else v + 1
                    _add_lines(
                        square, total, odd, scores, shape.shifts[v:last], b[v:last], scales, found,
                        line_a[row, place // group, v], line_b[row, place // group, v],
                    )  # fmt: skip
        for row in range(rows):
            if size[row] == 0:
                continue
            for g in range(groups):
                start[g] = math.log(mean[row, g] * ratios[0])
            d[row, block] = _choose(
                size[row], shape.step, start, pitch, odds, line_a[row], line_b[row],
                best, best_s, line, trial_s, trial_line,
            )  # fmt: skip
            for g in range(groups):
                s[row, block * groups + g] = best_s[g]
                variant[row, block * groups + g] = line[g, 0]
    return d, s, variant


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
                    way, shift = _choice(choice, odd, parts)
                    moved = np.float32(2) * shifts[shift] * total
                    found[part, choice] = nearest(
                        scores[part, way], norms[shift, part], square - moved, order
                    )
            second = _second(np.float32(1), found, total, odd, scores, shifts, norms) if choices > 1 else -1
            code = 0
            for part in range(parts):
                way, shift = _choice(1 if part == second else 0, odd, parts)
                k = found[part, 1 if part == second else 0]
                code |= (k + shift * count) << part * shape.bits
                if way == 1:
                    bits ^= 1 << cheapest(weighted, points, part, k)
            codes[row, place] = code | (bits & (1 << kept) - 1) << parts * shape.bits
    return codes
