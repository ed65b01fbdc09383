"""The two levels of scales of a lattice block, compiled: e = d (2 s + 1) step.

For each group scales of every size are tried; each leaves a line (A, B), the sums over the group's nearest points
(see ``_lattice_search``). The group's error at any scale is then the least of C - 2 e A + e^2 B over its lines: exact at
the scales that were tried, and hardly above it between them. So hundreds of pairs of d and s are compared without
touching the weights again.
"""

# mypy: disallow-untyped-defs=False

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from poise.formats._lattice_search import (
    EVEN,
    choose_way,
    instruction,
    is_odd,
    line_of,
    loop,
    project,
    second_part,
    signed,
    squares,
)

BATCH = 4
"""Scales that are tried at once."""
BLOCK = 256
TRIES = 12
"""Values of d tried besides those that suit the largest group."""
POLISH = 3
"""Repetitions of (least-squares d, best s)."""
TINY, HUGE = np.float32(1e-20), np.float32(1e12)
"""Blocks of smaller magnitude are zero, of larger magnitude refused: no format of float16 scales reaches so far."""
LEAST = 2.0**-24
"""The smallest float16."""
SMALL = np.float32(1 / 256)
"""The least root mean square of a group that scales are tried for, relative to the block's largest magnitude."""


@instruction
def _tagged(typing: Any, value: Any, mask: Any, tag: Any) -> Any:
    """``_order(value) & mask | tag``, which numba would do in 64 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        return builder.or_(builder.and_(bits, arguments[1]), arguments[2])

    return types.int32(types.float32, types.int32, types.int32), generate


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
def _add_lines(square, total, odd, scores, shifts, b, scales, found, line_a, line_b):
    """Adds A and B of one unit's nearest points at every scale to its group's lines."""
    parts, index = scores.shape[0], np.int32(scores.shape[2] - 1)
    choices = 2 if odd and parts > 1 else shifts.shape[0]
    for first in range(0, scales.shape[0], BATCH):
        for part in range(parts):
            for choice in range(choices):
                way, shift = choose_way(choice, odd, parts)
                moved, target = np.float32(2) * shifts[shift] * total, found[:, part, choice]
                _nearest_four(scores[part, way], b[shift, part], square, moved, scales, first, index, target)
        for i in range(BATCH):
            t, second = first + i, -1
            if choices > 1:
                second = second_part(scales[t], found[i], total, odd, scores, shifts, b)
            for part in range(parts):
                choice = 1 if part == second else 0
                more_a, more_b = line_of(part, choice, found[i, part, choice], total, odd, scores, shifts, b)
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
    scales, best, start = np.zeros(tries, dtype=np.float32), np.zeros(groups), np.zeros(groups)
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
                for t in range(tries):
                    scales[t] = mean[row, place // group] * ratios[t]
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
