"""Nearest points of E8P, compiled. See ``_lattice_search`` for A, B and C.

The shift is not multiplied by a sign, so A is another one for either shift. A scale that is tried costs a search.
Everything is doubled, so that patterns are whole numbers.
"""

# mypy: disallow-untyped-defs=False

import numpy as np

from poise.formats._lattice_search import FAR, FREE, cheapest, is_odd, loop, nearest, project, signed, squares

SHIFT = np.float32(0.5)


@loop
def _nearest(x, weights, halves, even, b, scores, order, moved, weighted):
    """(pattern, bits of the signs, whether the shift is negative) nearest to x.

    Patterns of an even sum (the first half) have an even number of minus signs, the others an odd one.
    """
    best, chosen, minus, down = np.float32(3e38), 0, 0, 0
    for side in range(2):
        for j in range(8):
            moved[j] = x[j] + SHIFT if side else x[j] - SHIFT
        bits, square, _ = signed(moved, weights, FREE, weighted)
        parity = 1 if is_odd(bits) else 0
        for half in range(2):
            points, norms = halves[half], b[half][0, 0]
            mine = scores[half]
            wrong = parity != half
            project(weighted, wrong, points, mine)
            way = 1 if wrong else 0
            k = nearest(mine[0, way], norms, square, order[half])
            error = square + (norms[k] - 2 * mine[0, way, k])
            if error < best:
                best, chosen, down = error, k + half * even, side
                minus = bits ^ (1 << cheapest(weighted, points, 0, k)) if wrong else bits
    return chosen, minus, down


@loop
def _scaled(row, first, scale, x):
    """x = 2 row / scale; in double precision, as the smallest scales have no reciprocal in single."""
    factor = 2 / np.float64(scale) if scale != 0 else 0.0
    for j in range(8):
        x[j] = max(-FAR, min(FAR, row[first + j] * factor))


@loop
def nearest_e8(weight, importance, scale, halves, even):
    """Codes int32 [rows, columns / 8]: pattern, seven signs, and whether the shift is negative.

    Args:
        weight: [rows, columns].
        importance: [columns], positive, at most 1 in every eight.
        scale: [rows, groups].
        halves: [8, patterns] of even sum and of odd, both padded.
        even: number of patterns of even sum.
    """
    rows, columns = weight.shape
    codes = np.zeros((rows, columns // 8), dtype=np.int32)
    count = halves[0].shape[1], halves[1].shape[1]
    scores = np.zeros((1, 2, count[0]), dtype=np.float32), np.zeros((1, 2, count[1]), dtype=np.float32)
    order = np.zeros(count[0], dtype=np.int32), np.zeros(count[1], dtype=np.int32)
    b = np.zeros((1, 1, count[0]), dtype=np.float32), np.zeros((1, 1, count[1]), dtype=np.float32)
    x, moved, weighted = np.zeros(8, np.float32), np.zeros(8, np.float32), np.zeros(8, np.float32)
    none = np.zeros(1, dtype=np.float32)
    for place in range(columns // 8):
        here = importance[8 * place : 8 * place + 8]
        for half in range(2):
            squares(here, halves[half], none, b[half])
        for row in range(rows):
            e = scale[row, place * scale.shape[1] * 8 // columns]
            _scaled(weight[row], 8 * place, e, x)
            pattern, minus, down = _nearest(x, here, halves, even, b, scores, order, moved, weighted)
            codes[row, place] = pattern | (minus & 127) << 8 | down << 15
    return codes


@loop
def sums_e8(weight, importance, scale, halves, even):
    """4 (sum w y q, sum w q^2) float64 [rows, groups, tries] for y = x / scale and the points q nearest to y.

    Args:
        weight: [rows, columns].
        importance: [columns], positive, at most 1.
        scale: [rows, groups, tries].
        halves: [8, patterns] of even sum and of odd, both padded.
        even: number of patterns of even sum.
    """
    rows, columns = weight.shape
    a, square = np.zeros(scale.shape), np.zeros(scale.shape)
    count = halves[0].shape[1], halves[1].shape[1]
    scores = np.zeros((1, 2, count[0]), dtype=np.float32), np.zeros((1, 2, count[1]), dtype=np.float32)
    order = np.zeros(count[0], dtype=np.int32), np.zeros(count[1], dtype=np.int32)
    b = np.zeros((1, 1, count[0]), dtype=np.float32), np.zeros((1, 1, count[1]), dtype=np.float32)
    x, moved, weighted = np.zeros(8, np.float32), np.zeros(8, np.float32), np.zeros(8, np.float32)
    none = np.zeros(1, dtype=np.float32)
    for place in range(columns // 8):
        here = importance[8 * place : 8 * place + 8]
        for half in range(2):
            squares(here, halves[half], none, b[half])
        group = place * scale.shape[1] * 8 // columns
        for row in range(rows):
            for t in range(scale.shape[2]):
                _scaled(weight[row], 8 * place, scale[row, group, t], x)
                pattern, minus, down = _nearest(x, here, halves, even, b, scores, order, moved, weighted)
                odd = pattern >= even
                k = pattern - even if odd else pattern
                for j in range(8):
                    q = halves[1][j, k] if odd else halves[0][j, k]
                    q = (-q if minus >> j & 1 else q) + (-SHIFT if down else SHIFT)
                    a[row, group, t] += here[j] * x[j] * q
                    square[row, group, t] += here[j] * q * q
    return a, square
