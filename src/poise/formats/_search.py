"""Scales of least squared error for groups of weights on a fixed grid of levels, compiled.

For a scale s every weight x goes to the level v nearest to x / s; with importance w the best scale for these
levels is s a / b with a = sum w v x / s and b = sum w v^2, and the error is then sum w x^2 - s^2 a^2 / b. Several
scales are tried for each group, the best is polished by repeating the two steps (Lloyd 1982), which never makes it
worse. Scores are in units of the largest weight of the group, so that no weight is too small or too large for them.

Weights are [rows, columns]; groups of n columns, the last of a row may be shorter. Importance is [1, columns] or
[rows, columns].
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from poise.kernels import exact, fast, finite, inlined

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

BATCH = 2048
"""Weights that are worked on at once: whole groups, or one if it is larger. They stay in the first-level cache."""
FEW = 17
"""Up to this many levels, comparing with every boundary is faster than looking up where to begin."""
PREFIX = 17
"""Bits of a float32 that are dropped for the look-up: sign, exponent and 6 bits of the significand remain."""

INSETS = np.array([-0.5, 0.0, 0.8], dtype=np.float32)
"""Where scale and minimum are free, both ends of a group's range are tried this many steps further in. With 0, decoded
weights are encoded to themselves."""
REGRESSIONS = 3
"""Rounds of (nearest codes, regression) for each range."""

TINY = np.float32(1e-36)
"""Weights below are taken for zeros: the inverse of their scale would be infinite."""

ZERO, ONE = np.float32(0), np.float32(1)


class Levels(NamedTuple):
    """A grid.

    Attributes:
        values: ascending.
        bounds: one between each two neighbours: what is above ``bounds[i]`` goes above ``values[i]``. One infinity more.
        uniform: whether values are consecutive whole numbers, which need no look-up.
        start: number of bounds below every float with the same leading bits; empty for few levels.
        steps: most bounds that floats with the same leading bits lie around.
    """

    values: Floats
    bounds: Floats
    uniform: bool
    start: npt.NDArray[np.int32]
    steps: int


def make_levels(values: Floats, bounds: Floats) -> Levels:
    """The grid of ascending values with one boundary between each two."""
    uniform = bool(np.all(np.diff(values) == 1) and np.all(values == np.rint(values)))
    if len(values) <= FEW:
        start, steps = np.zeros(0, dtype=np.int32), 0
    else:
        prefixes = np.arange(1 << 32 - PREFIX, dtype=np.uint32) << np.uint32(PREFIX)
        ends = np.stack((prefixes, prefixes | np.uint32((1 << PREFIX) - 1))).view(np.float32)
        ends = np.where(np.isnan(ends), np.copysign(np.float32(np.inf), ends), ends)
        below = np.searchsorted(bounds, ends)
        start, steps = below.min(0).astype(np.int32), int((below.max(0) - below.min(0)).max())
    full = np.append(bounds, np.float32(np.inf)).astype(np.float32)
    return Levels(values.astype(np.float32), full, uniform, start, steps)


def narrower(ratio: float, n: int) -> float:
    """A scale that suits groups of 64, as a share of the one that covers the group, for groups of n.

    The largest of n normal numbers grows like sqrt(2 ln n), and the best clipping does not.
    """
    return ratio * min(1.0, math.sqrt(math.log(64) / math.log(max(n, 64))))


@inlined
def _index(t: Any, index: Any, m: Any, grid: Any) -> None:
    """index[:m] = number of bounds below t[:m]."""
    if grid.steps == 0:
        for i in range(m):
            index[i] = 0
        for k in range(grid.values.shape[0] - 1):
            bound = grid.bounds[k]
            for i in range(m):
                index[i] += 1 if t[i] > bound else 0
    else:
        bits = t.view(np.uint32)
        for i in range(m):
            index[i] = grid.start[bits[i] >> PREFIX]
        for _ in range(grid.steps):
            for i in range(m):
                index[i] += 1 if t[i] > grid.bounds[index[i]] else 0


@inlined
def nearest_levels(t: Any, v: Any, index: Any, m: Any, grid: Any) -> None:
    """v[:m] = values nearest to t[:m]."""
    last = grid.values.shape[0] - 1
    if grid.uniform:
        low, high = grid.values[0], grid.values[last]
        for i in range(m):
            v[i] = min(max(np.rint(t[i]), low), high)
    elif grid.steps == 0:
        for i in range(m):
            v[i] = grid.values[0]
        for k in range(last):
            bound, step = grid.bounds[k], grid.values[k + 1] - grid.values[k]
            for i in range(m):
                v[i] += step if t[i] > bound else ZERO
    else:
        _index(t, index, m, grid)
        for i in range(m):
            v[i] = grid.values[index[i]]


@inlined
def _scaled(x: Any, scales: Any, n: Any, t: Any) -> None:
    """t = x / scale of its group; zero where that is zero."""
    for j in range(scales.shape[0]):
        inverse = ONE / scales[j] if scales[j] != ZERO else ZERO
        group, scaled = x[j * n : (j + 1) * n], t[j * n : (j + 1) * n]
        for i in range(group.shape[0]):
            scaled[i] = group[i] * inverse


@inlined
def usable_weights(importance: Any, n: Any, out: Any) -> None:
    """Importance, equal in groups that have none."""
    for j in range((importance.shape[0] + n - 1) // n):
        group, used = importance[j * n : (j + 1) * n], out[j * n : (j + 1) * n]
        total = ZERO
        for value in group:
            total += value
        for i in range(group.shape[0]):
            used[i] = group[i] if total > ZERO else ONE


@inlined
def _products(t: Any, v: Any, w: Any) -> Any:
    """(sum w v t, sum w v^2)."""
    a, b = ZERO, ZERO
    for i in range(t.shape[0]):
        wv = w[i] * v[i]
        a += wv * t[i]
        b += wv * v[i]
    return a, b


@inlined
def _distance(t: Any, v: Any, w: Any) -> Any:
    """sum w (t - v)^2."""
    error = ZERO
    for i in range(t.shape[0]):
        d = t[i] - v[i]
        error += w[i] * d * d
    return error


@fast
def best_scales(
    x: Any, importance: Any, n: Any, grid: Any, ratios: Any, mirror: Any, polish: Any
) -> tuple[Floats, Floats]:
    """The best scale of every group, zero for groups of zeros, and the share of sum w x^2 that its levels explain;
    both [rows, groups], the share in units that only compare scales of the same group.

    Args:
        ratios: scales to try, as multiples of the one that just covers the group.
        mirror: whether negative scales are tried too.
        polish: rounds of (nearest levels, best scale) after the tries.
    """
    rows, columns = x.shape
    groups, batch = (columns + n - 1) // n, max(1, BATCH // n)
    out = np.zeros((rows, groups), dtype=np.float32)
    explained = np.zeros((rows, groups), dtype=np.float32)
    room = min(batch * n, columns)
    t, v, w = np.empty(room, np.float32), np.empty(room, np.float32), np.empty(room, np.float32)
    index = np.empty(room, dtype=np.int32)
    s, size, cover = (
        np.empty(batch, np.float32),
        np.empty(batch, np.float32),
        np.empty((2, batch), np.float32),
    )
    tries = ratios.shape[0] * (2 if mirror else 1)
    for row in range(rows):
        for first in range(0, groups, batch):
            part = x[row, first * n : min((first + batch) * n, columns)]
            count, m = min(batch, groups - first), part.shape[0]
            usable_weights(importance[row % importance.shape[0], first * n : first * n + m], n, w)
            best, score = out[row, first : first + count], explained[row, first : first + count]
            for j in range(count):
                best[j], size[j], cover[0, j], cover[1, j] = _covers(part[j * n : (j + 1) * n], grid, mirror)
                score[j] = np.float32(np.inf) if cover[0, j] == ZERO else -ONE  # constant: found already
            for k in range(tries + polish):
                for j in range(count):
                    side = k // ratios.shape[0]
                    s[j] = best[j] if k >= tries else cover[side, j] * ratios[k % ratios.shape[0]]
                _scaled(part, s[:count], n, t)
                nearest_levels(t, v, index, m, grid)
                for j in range(count):
                    a, b = _products(t[j * n : min((j + 1) * n, m)], v[j * n :], w[j * n :])
                    if b > ZERO and a != ZERO:
                        share = a * (s[j] / size[j])
                        if share * share / b > score[j]:
                            score[j], best[j] = share * share / b, s[j] * (a / b)
    return out, explained


@inlined
def _covers(x: Any, grid: Any, mirror: Any) -> Any:
    """(scale of a constant group, largest magnitude, scale that covers the group, another one).

    A scale that may be negative puts the extreme weight on the outermost level, or on the other end of the grid; where
    that is zero, the other extreme on the outermost level. The covering scales of a constant group are zero.
    """
    first, last = grid.values[0], grid.values[grid.values.shape[0] - 1]
    far, near = (last, first) if last > -first else (first, last)
    high, low = x[0], x[0]
    for value in x:
        high, low = max(high, value), min(low, value)
    extreme = high if high >= -low else low
    up = ONE / last if last > ZERO else ZERO
    down = ONE / first if first < ZERO else ZERO
    if abs(extreme) < TINY:
        return ZERO, ONE, ZERO, ZERO
    if high == low:
        end = far if mirror else last if high > ZERO else first
        return high / end if end != ZERO else ZERO, ONE, ZERO, ZERO
    if mirror:
        other = extreme / near if near != ZERO else (high + low - extreme) / far
        return ZERO, abs(extreme), extreme / far, other
    return ZERO, abs(extreme), max(high * up, low * down), ZERO


@inlined
def _largest(x: Any) -> Any:
    """The largest magnitude; 1 for zeros."""
    size = ZERO
    for value in x:
        size = max(size, abs(value))
    return size if size > ZERO else ONE


@fast
def best_candidate(x: Any, importance: Any, n: Any, grid: Any, candidates: Any) -> npt.NDArray[np.int64]:
    """Which of the scales [rows, groups, k] has the least squared error, [rows, groups]; the first of equals."""
    rows, columns = x.shape
    groups, batch = (columns + n - 1) // n, max(1, BATCH // n)
    out = np.zeros((rows, groups), dtype=np.int64)
    room = min(batch * n, columns)
    t, v, w = np.empty(room, np.float32), np.empty(room, np.float32), np.empty(room, np.float32)
    index = np.empty(room, dtype=np.int32)
    least, size = np.empty(batch, np.float32), np.empty(batch, np.float32)
    zeros = np.zeros(room, np.float32)
    for row in range(rows):
        for first in range(0, groups, batch):
            part = x[row, first * n : min((first + batch) * n, columns)]
            count, m = min(batch, groups - first), part.shape[0]
            usable_weights(importance[row % importance.shape[0], first * n : first * n + m], n, w)
            least[:] = np.inf
            for j in range(count):
                size[j] = _largest(part[j * n : (j + 1) * n])
            for k in range(candidates.shape[2]):
                s = candidates[row, first : first + count, k]
                _scaled(part, s, n, t)
                nearest_levels(t, v, index, m, grid)
                for j in range(count):
                    group, levels = t[j * n : min((j + 1) * n, m)], v[j * n :]
                    if s[j] == ZERO:
                        group, levels = part[j * n : (j + 1) * n], zeros
                    error = _distance(group, levels, w[j * n :])
                    unit = (s[j] if s[j] != ZERO else ONE) / size[j]
                    if error * unit * unit < least[j]:
                        least[j], out[row, first + j] = error * unit * unit, k
    return out


@exact
def nearest_codes(x: Any, scale: Any, n: Any, grid: Any, codes: Any) -> Codes:
    """Codes of the levels nearest to x / scale, uint8 [rows, columns]; a zero scale gives the level of zero."""
    rows, columns = x.shape
    out = np.empty((rows, columns), dtype=np.uint8)
    t, index = np.empty(BATCH, dtype=np.float32), np.empty(BATCH, dtype=np.int32)
    for row in range(rows):
        scales = scale[row % scale.shape[0]]
        for begin in range(0, columns, BATCH):
            m = min(BATCH, columns - begin)
            place = 0
            while place < m:
                group = (begin + place) // n
                stop = min((group + 1) * n - begin, m)
                divisor = scales[group] if scales[group] != ZERO else np.float32(np.inf)
                for i in range(place, stop):
                    t[i] = x[row, begin + i] / divisor
                place = stop
            if grid.uniform:
                low, high = grid.values[0], grid.values[grid.values.shape[0] - 1]
                for i in range(m):
                    index[i] = np.int32(min(max(np.rint(t[i]), low), high) - low)
            else:
                _index(t, index, m, grid)
            part = out[row, begin : begin + m]
            for i in range(m):
                part[i] = codes[index[i]]
    return out


@fast
def best_zeros(x: Any, importance: Any, n: Any, top: Any, ratios: Any, polish: Any) -> tuple[Floats, Codes]:
    """Scale and zero point of every group, [rows, groups], for w = s (q - z) with q and z = 0..top."""
    rows, columns = x.shape
    groups = (columns + n - 1) // n
    scales = np.zeros((rows, groups), dtype=np.float32)
    zeros = np.zeros((rows, groups), dtype=np.uint8)
    w = np.empty(columns, dtype=np.float32)
    for row in range(rows):
        if row < importance.shape[0]:
            usable_weights(importance[row], n, w)
        for group in range(groups):
            part, weight = x[row, group * n : (group + 1) * n], w[group * n : (group + 1) * n]
            high, low = part[0], part[0]
            for value in part:
                high, low = max(high, value), min(low, value)
            if max(high, -low) < TINY:
                continue
            if high == low:  # one step from zero: exact
                scales[row, group], zeros[row, group] = abs(high), np.uint8(1 if high < ZERO else 0)
                continue
            high, low = max(high, ZERO), min(low, ZERO)
            size = max(high, -low)
            best, best_zero, best_score = ZERO, ZERO, -ONE
            for ratio in ratios:
                s = (high - low) * ratio / top
                for side in range(2):
                    zero = min(max(np.floor(-low * ratio / s) + side, ZERO), top)
                    score, polished = _score(part, weight, s, size, -zero, top - zero)
                    if score > best_score:
                        best_score, best, best_zero = score, polished, zero
            for _ in range(polish):
                score, s = _score(part, weight, best, size, -best_zero, top - best_zero)
                if score > best_score:
                    best_score, best = score, s
            scales[row, group], zeros[row, group] = best, np.uint8(best_zero)
    return scales, zeros


@inlined
def _score(x: Any, w: Any, s: Any, size: Any, low: Any, high: Any) -> Any:
    """Share of sum w x^2 that whole numbers from low to high explain at scale s, and the best scale for them;
    (-1, s) when all are zero."""
    a, b = ZERO, ZERO
    inverse = ONE / s
    for i in range(x.shape[0]):
        t = x[i] * inverse
        q = min(max(np.rint(t), low), high)
        a += w[i] * q * t
        b += w[i] * q * q
    if b > ZERO and a != ZERO:
        share = a * (s / size)
        return share * share / b, s * (a / b)
    return -ONE, s


@exact
def nearest_steps(x: Any, scale: Any, minimum: Any, n: Any, top: Any) -> Codes:
    """Whole numbers q = 0..top with scale q + minimum nearest to x, uint8 [rows, columns]; 0 where the scale is zero."""
    rows, columns = x.shape
    out = np.empty((rows, columns), dtype=np.uint8)
    for row in range(rows):
        for group in range((columns + n - 1) // n):
            part, codes = x[row, group * n : (group + 1) * n], out[row, group * n : (group + 1) * n]
            s, m = scale[row, group], minimum[row, group]
            divisor = s if s != ZERO else np.float32(np.inf)
            for i in range(part.shape[0]):
                codes[i] = np.uint8(min(max(np.rint((part[i] - m) / divisor), ZERO), top))
    return out


@finite
def extremes(x: Any, n: Any) -> tuple[Floats, Floats]:
    """Smallest and largest of every group of n columns, [rows, groups] each."""
    rows, columns = x.shape
    groups = (columns + n - 1) // n
    lowest, highest = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.float32)
    for row in range(rows):
        for group in range(groups):
            part = x[row, group * n : (group + 1) * n]
            low, high = part[0], part[0]
            for i in range(part.shape[0]):
                low, high = min(low, part[i]), max(high, part[i])
            lowest[row, group], highest[row, group] = low, high
    return lowest, highest


@fast
def best_ranges(x: Any, importance: Any, n: Any, top: Any) -> tuple[Floats, Floats]:
    """Scale and minimum of every group, [rows, groups], for w = s q + m with q = 0..top.

    Every range tried is the group's with its ends moved by ``INSETS``; the best (s, m) for given codes is the weighted
    linear regression of x on q.
    """
    rows, columns = x.shape
    groups = (columns + n - 1) // n
    scales = np.zeros((rows, groups), dtype=np.float32)
    minima = np.zeros((rows, groups), dtype=np.float32)
    w = np.empty(columns, dtype=np.float32)
    for row in range(rows):
        if row < importance.shape[0]:
            usable_weights(importance[row], n, w)
        for group in range(groups):
            part, weight = x[row, group * n : (group + 1) * n], w[group * n : (group + 1) * n]
            high, low = part[0], part[0]
            for value in part:
                high, low = max(high, value), min(low, value)
            minima[row, group] = low
            if high - low < TINY:
                continue
            step = (high - low) / top
            least = np.float32(np.inf)
            for bottom in INSETS:
                for peak in INSETS:
                    s, m = step * (top - bottom - peak) / top, low + bottom * step
                    for _ in range(REGRESSIONS + 1):
                        error, s_next, m_next = _regress(part, weight, s, m, top)
                        error *= (s / step) * (s / step)
                        if error < least:
                            least, scales[row, group], minima[row, group] = error, s, m
                        s, m = s_next, m_next
    return scales, minima


@inlined
def _regress(x: Any, w: Any, s: Any, m: Any, top: Any) -> Any:
    """Squared error of (s, m) in units of s^2, and the regression of x on the codes that they give."""
    inverse = ONE / s
    error, total, wq, wx, wqq, wqx = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
    for i in range(x.shape[0]):
        value = (x[i] - m) * inverse
        q = min(max(np.rint(value), ZERO), top)
        d = value - q
        error += w[i] * d * d
        total += w[i]
        wq += w[i] * q
        wx += w[i] * value
        wqq += w[i] * q * q
        wqx += w[i] * q * value
    power = wqq - wq * wq / total
    slope = (wqx - wq * wx / total) / power if power > ZERO else ZERO
    if slope <= ZERO:
        return error, s, m
    return error, s * slope, m + s * ((wx - slope * wq) / total)
