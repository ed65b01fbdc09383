"""Scales of least squared error for groups of weights on a fixed grid of levels, compiled.

For a scale s every weight x goes to the level v nearest to x / s; with importance w the best scale for these
levels is a / b with a = sum w x v and b = sum w v^2, and the error is then sum w x^2 - a^2 / b. Several scales
are tried for each group, the best is polished by repeating the two steps (Lloyd 1982), which never makes it worse.

A grid is ``levels`` (ascending float32) or, for whole numbers from ``levels[0]`` to ``levels[-1]``, ``uniform``.
Weights are [rows, columns]; groups of n columns, the last of a row may be shorter. Importance is [1, columns] or
[rows, columns].
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from poise.formats._compiled import exact, fast, inlined

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

CHUNK = 256
"""Weights whose levels are held at once: they stay in the first-level cache."""
FEW = 17
"""Up to this many levels, comparing with every boundary is faster than a binary search."""

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


@inlined
def _nearest(t: Any, v: Any, index: Any, m: Any, levels: Any, bounds: Any, uniform: Any) -> None:
    """v[:m] = levels nearest to t[:m]."""
    count = levels.shape[0]
    if uniform:
        low, high = levels[0], levels[count - 1]
        for i in range(m):
            v[i] = min(max(np.rint(t[i]), low), high)
    elif count <= FEW:
        for i in range(m):
            v[i] = levels[0]
        for k in range(count - 1):
            bound, step = bounds[k], levels[k + 1] - levels[k]
            for i in range(m):
                v[i] += step if t[i] > bound else ZERO
    else:
        _search(t, index, m, count, bounds)
        for i in range(m):
            v[i] = levels[index[i]]


@inlined
def _search(t: Any, index: Any, m: Any, count: Any, bounds: Any) -> None:
    """index[:m] = number of bounds below t[:m]; bounds are padded with infinity to a power of two."""
    for i in range(m):
        index[i] = 0
    half = bounds.shape[0] // 2
    while half > 0:
        for i in range(m):
            index[i] += half if t[i] > bounds[index[i] + half - 1] else 0
        half //= 2


@fast
def best_scales(
    x: Any,
    importance: Any,
    n: Any,
    levels: Any,
    bounds: Any,
    uniform: Any,
    ratios: Any,
    mirror: Any,
    polish: Any,
) -> tuple[Floats, Floats]:
    """The best scale of every group, zero for groups of zeros, and the share of sum w x^2 that its levels explain;
    both [rows, groups], the share in units that only compare scales of the same group.

    Args:
        ratios: scales to try, as multiples of the one that just covers the group.
        mirror: whether negative scales are tried too.
        polish: at most so many rounds of (nearest levels, best scale) after the tries.
    """
    rows, columns = x.shape
    groups = (columns + n - 1) // n
    out = np.zeros((rows, groups), dtype=np.float32)
    explained = np.zeros((rows, groups), dtype=np.float32)
    t, v = np.empty(CHUNK, dtype=np.float32), np.empty(CHUNK, dtype=np.float32)
    index = np.empty(CHUNK, dtype=np.int32)
    ones = np.ones(CHUNK, dtype=np.float32)
    first, last = levels[0], levels[-1]
    for row in range(rows):
        w_row = importance[row % importance.shape[0]]
        for group in range(groups):
            start, stop = group * n, min((group + 1) * n, columns)
            high, low, weight = x[row, start], x[row, start], ZERO
            for i in range(start, stop):
                high, low, weight = max(high, x[row, i]), min(low, x[row, i]), weight + w_row[i]
            if high == low:  # exactly, where dividing sums is not
                far = last if (last > -first if mirror else high > ZERO) else first
                out[row, group] = high / far if far != ZERO else ZERO
                continue
            flat = weight == ZERO
            size = max(high, -low)
            best, best_score = ZERO, -ONE
            for side in range(2 if mirror else 1):
                up, down = (high, low) if side == 0 else (-low, -high)
                cover = max(up / last if last > ZERO else ZERO, down / first if first < ZERO else ZERO)
                for ratio in ratios:
                    s = cover * ratio if side == 0 else -cover * ratio
                    score, s = _score(
                        x[row], w_row, ones, flat, start, stop, s, size, t, v, index, levels, bounds, uniform
                    )
                    if score > best_score:
                        best_score, best = score, s
            for _ in range(polish):
                score, s = _score(
                    x[row], w_row, ones, flat, start, stop, best, size, t, v, index, levels, bounds, uniform
                )
                if not score > best_score:
                    break
                best_score, best = score, s
            out[row, group], explained[row, group] = best, best_score
    return out, explained


@fast
def best_zeros(x: Any, importance: Any, n: Any, top: Any, ratios: Any, polish: Any) -> tuple[Floats, Codes]:
    """Scale and zero point of every group, [rows, groups], for w = s (q - z) with q and z = 0..top."""
    rows, columns = x.shape
    groups = (columns + n - 1) // n
    scales = np.zeros((rows, groups), dtype=np.float32)
    zeros = np.zeros((rows, groups), dtype=np.uint8)
    t, v = np.empty(CHUNK, dtype=np.float32), np.empty(CHUNK, dtype=np.float32)
    index = np.empty(1, dtype=np.int32)
    ones = np.ones(CHUNK, dtype=np.float32)
    levels = np.empty(2, dtype=np.float32)
    for row in range(rows):
        w_row = importance[row % importance.shape[0]]
        for group in range(groups):
            start, stop = group * n, min((group + 1) * n, columns)
            high, low, weight = x[row, start], x[row, start], ZERO
            for i in range(start, stop):
                high, low, weight = max(high, x[row, i]), min(low, x[row, i]), weight + w_row[i]
            if high == low:  # one step from zero: exact
                scales[row, group], zeros[row, group] = abs(high), np.uint8(1 if high < ZERO else 0)
                continue
            flat = weight == ZERO
            high, low = max(high, ZERO), min(low, ZERO)
            size = max(high, -low)
            best, best_zero, best_score = ZERO, ZERO, -ONE
            for ratio in ratios:
                s = (high - low) * ratio / top
                for side in range(2):
                    zero = min(max(np.floor(-low * ratio / s) + side, ZERO), top)
                    levels[0], levels[1] = -zero, top - zero
                    score, polished = _score(
                        x[row], w_row, ones, flat, start, stop, s, size, t, v, index, levels, levels, True
                    )
                    if score > best_score:
                        best_score, best, best_zero = score, polished, zero
            levels[0], levels[1] = -best_zero, top - best_zero
            for _ in range(polish):
                score, s = _score(
                    x[row], w_row, ones, flat, start, stop, best, size, t, v, index, levels, levels, True
                )
                if not score > best_score:
                    break
                best_score, best = score, s
            scales[row, group], zeros[row, group] = best, np.uint8(best_zero)
    return scales, zeros


@fast
def _score(
    x: Any, w: Any, ones: Any, flat: Any, start: Any, stop: Any, s: Any, size: Any, t: Any, v: Any, index: Any,
    levels: Any, bounds: Any, uniform: Any,
) -> Any:  # fmt: skip
    """(a^2 / b, a / b) of the levels nearest to x / s, the first in units of size^2, so that no weight is too
    small or large for it; (-1, s) when all levels are zero."""
    a, b = ZERO, ZERO
    inverse = ONE / s
    for begin in range(start, stop, CHUNK):
        m = min(CHUNK, stop - begin)
        part = x[begin : begin + m]
        weight = ones if flat else w[begin : begin + m]
        for i in range(m):
            t[i] = part[i] * inverse
        _nearest(t, v, index, m, levels, bounds, uniform)
        for i in range(m):
            wv = weight[i] * v[i]
            a += wv * t[i]
            b += wv * v[i]
    if b > ZERO and a != ZERO:
        share = a * (s / size)
        return share * share / b, s * (a / b)
    return -ONE, s


@fast
def best_candidate(
    x: Any, importance: Any, n: Any, levels: Any, bounds: Any, uniform: Any, candidates: Any
) -> npt.NDArray[np.int64]:
    """Which of the scales [rows, groups, k] has the least squared error, [rows, groups]; the first of equals."""
    rows, columns = x.shape
    groups = (columns + n - 1) // n
    out = np.zeros((rows, groups), dtype=np.int64)
    t, v = np.empty(CHUNK, dtype=np.float32), np.empty(CHUNK, dtype=np.float32)
    index = np.empty(CHUNK, dtype=np.int32)
    for row in range(rows):
        w_row = importance[row % importance.shape[0]]
        for group in range(groups):
            start, stop = group * n, min((group + 1) * n, columns)
            weight = ZERO
            for i in range(start, stop):
                weight += w_row[i]
            least = np.float32(np.finfo(np.float32).max)
            for k in range(candidates.shape[2]):
                s = candidates[row, group, k]
                inverse = ONE / s if s != ZERO else ZERO
                error = ZERO
                for begin in range(start, stop, CHUNK):
                    m = min(CHUNK, stop - begin)
                    for i in range(m):
                        t[i] = x[row, begin + i] * inverse
                    _nearest(t, v, index, m, levels, bounds, uniform)
                    for i in range(m):
                        d = t[i] - v[i]
                        error += (ONE if weight == ZERO else w_row[begin + i]) * d * d
                unit = s / candidates[row, group, 0]
                error *= unit * unit
                if error < least:
                    least, out[row, group] = error, k
    return out


@exact
def nearest_codes(x: Any, scale: Any, n: Any, bounds: Any, codes: Any, count: Any) -> Codes:
    """Codes of the levels nearest to x / scale, uint8 [rows, columns]; a zero scale gives the level of zero."""
    rows, columns = x.shape
    out = np.empty((rows, columns), dtype=np.uint8)
    t, index = np.empty(CHUNK, dtype=np.float32), np.empty(CHUNK, dtype=np.int32)
    for row in range(rows):
        for group in range((columns + n - 1) // n):
            s = scale[row % scale.shape[0], group]
            divisor = s if s != ZERO else np.float32(np.inf)
            stop = min((group + 1) * n, columns)
            for begin in range(group * n, stop, CHUNK):
                m = min(CHUNK, stop - begin)
                for i in range(m):
                    t[i] = x[row, begin + i] / divisor
                if count <= FEW:
                    for i in range(m):
                        index[i] = 0
                    for k in range(count - 1):
                        bound = bounds[k]
                        for i in range(m):
                            index[i] += 1 if t[i] > bound else 0
                else:
                    _search(t, index, m, count, bounds)
                for i in range(m):
                    out[row, begin + i] = codes[index[i]]
    return out


@fast
def best_ranges(x: Any, importance: Any, n: Any, top: Any, ratios: Any, polish: Any) -> tuple[Floats, Floats]:
    """Scale and minimum of every group, [rows, groups], for w = s q + m with q = 0..top.

    Every range tried is the group's, shrunk about its middle by one of ``ratios``; the best (s, m) for given
    codes is weighted linear regression of x on q.
    """
    rows, columns = x.shape
    groups = (columns + n - 1) // n
    scales = np.zeros((rows, groups), dtype=np.float32)
    minima = np.zeros((rows, groups), dtype=np.float32)
    for row in range(rows):
        w_row = importance[row % importance.shape[0]]
        for group in range(groups):
            start, stop = group * n, min((group + 1) * n, columns)
            high, low, total = x[row, start], x[row, start], ZERO
            for i in range(start, stop):
                high, low, total = max(high, x[row, i]), min(low, x[row, i]), total + w_row[i]
            minima[row, group] = low
            if high == low:
                continue
            flat = total == ZERO
            middle, half = HALF * (high + low), HALF * (high - low)
            best_s, best_m, least = ZERO, low, np.float32(np.finfo(np.float32).max)
            for ratio in ratios:
                s, m = np.float32(2) * half * ratio / top, middle - half * ratio
                for _ in range(polish + 1):
                    error, s_next, m_next = _regress(x[row], w_row, flat, start, stop, s, m, top)
                    error *= (s / half) * (s / half)
                    if not error < least:
                        break
                    least, best_s, best_m = error, s, m
                    s, m = s_next, m_next
            scales[row, group], minima[row, group] = best_s, best_m
    return scales, minima


@fast
def _regress(x: Any, w: Any, flat: Any, start: Any, stop: Any, s: Any, m: Any, top: Any) -> Any:
    """Squared error of (s, m) in units of s^2, and the regression of x on the codes that they give."""
    inverse = ONE / s
    error, total, wq, wx, wqq, wqx = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
    for i in range(start, stop):
        value = (x[i] - m) * inverse
        weight = ONE if flat else w[i]
        q = min(max(np.rint(value), ZERO), top)
        d = value - q
        error += weight * d * d
        total += weight
        wq += weight * q
        wx += weight * value
        wqq += weight * q * q
        wqx += weight * q * value
    power = wqq - wq * wq / total
    if power <= ZERO:
        return error, s, m
    slope = (wqx - wq * wx / total) / power
    if slope <= ZERO:
        return error, s, m
    return error, s * slope, m + s * ((wx - slope * wq) / total)
