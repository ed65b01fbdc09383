"""One-dimensional weighted k-means on sorted values, compiled.

Sorted, a cluster is a run, and its mass and mean are differences of prefix sums: a round of Lloyd's algorithm (1982)
costs a few steps for each level, not one for each weight. For up to ``EXACT`` levels it starts from the best runs
that can be made of a few short ones a level, by dynamic programming: in groups of few weights, the exact optimum. More levels start as dense as the cube root of the density of the weights, the best for very
many (Panter and Dite 1951), as are the short runs.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from poise.kernels import exact, fast, inlined

Floats = npt.NDArray[np.float32]

ROUNDS = 100
"""Of Lloyd's algorithm at most; after exact runs few are needed."""
SETTLED = 1e-4
"""Share of the squared error; a round that lowers it by less is the last."""
EXACT = 16
"""Levels up to which runs are the best, in time that grows with the square of their number."""
COARSE, FEWEST = 6, 64
"""Short runs for each level, and at least: the error is 1.002 times that of the exact optimum, with 12 it is 1.0005
times, in rows of 1024 weights with and without heavy tails."""
BATCH = 1024
"""Weights that are rounded at once."""
FEW = 32
"""Up to this many levels, comparing with every boundary is faster than bisection."""


def codebooks(x: Floats, importance: Floats | None, count: int) -> Floats:
    """Ascending levels of least squared error of every group.

    Args:
        x: [groups, n].
        importance: [k, n], of the groups in turn: group i has row i % k.

    Returns:
        [groups, count]. Groups of no more different values than levels get exactly these; the last is repeated.
    """
    if importance is None:
        return _codebooks(np.sort(x, axis=1), np.ones((1, x.shape[1]), np.float32), count)
    order = np.argsort(x, axis=1)
    turns = np.arange(len(x))[:, None] % len(importance)
    return _codebooks(np.take_along_axis(x, order, axis=1), importance[turns, order], count)


@fast
def _codebooks(x: Any, w: Any, count: Any) -> Floats:
    """Levels of sorted groups x with their weights w."""
    groups, n = x.shape
    out = np.zeros((groups, count), dtype=np.float32)
    value, mass = np.empty(n, np.float64), np.empty(n, np.float64)
    below, moment = np.zeros(n + 1, np.float64), np.zeros(n + 1, np.float64)
    level, end = np.empty(count, np.float64), np.zeros(count + 1, np.int64)
    coarse = min(max(COARSE * count, FEWEST), n) if count <= EXACT else 0
    short = np.zeros(coarse + 1, np.int64)
    room = np.empty((2, coarse + 1), np.float64), np.zeros((count, coarse + 1), np.int64)
    for row in range(groups):
        unit = np.float64(max(-x[row, 0], x[row, n - 1]))
        m = _distinct(x[row], w[row % w.shape[0]], unit, count, value, mass)
        if m <= count:
            for i in range(count):
                out[row, i] = np.float32(value[min(i, m - 1)] * unit)
            continue
        energy = 0.0
        for i in range(m):
            below[i + 1] = below[i] + mass[i]
            moment[i + 1] = moment[i] + mass[i] * value[i]
            energy += mass[i] * value[i] * value[i]
        if coarse > 0:
            runs = min(coarse, m)
            _spread(value, mass, m, short[: runs + 1])
            _best_runs(below, moment, short[: runs + 1], end, room)
        else:
            _spread(value, mass, m, end)
        _lloyd(value, below, moment, m, energy, level, end)
        for i in range(count):
            out[row, i] = np.float32(level[i] * unit)
    return out


@inlined
def _distinct(x: Any, w: Any, unit: Any, count: Any, value: Any, mass: Any) -> Any:
    """Number of different values; themselves in units of the largest, and their masses.

    Values of no mass count only where all together are few, or none has any.
    """
    n, m, heaviest = x.shape[0], 0, np.float32(0)
    for i in range(n):
        heaviest = max(heaviest, w[i])
    per = 1.0 / heaviest if heaviest > 0 else 0.0  # weights that are all equal become exactly one
    for i in range(n):
        weight = w[i] * per if heaviest > 0 else 1.0
        scaled = x[i] / unit if unit > 0 else 0.0
        if m > 0 and value[m - 1] == scaled:
            mass[m - 1] += weight
        else:
            value[m], mass[m] = scaled, weight
            m += 1
    if m <= count:
        return m
    kept = 0
    for i in range(m):
        if mass[i] > 0:
            value[kept], mass[kept] = value[i], mass[i]
            kept += 1
    return kept


@inlined
def _spread(value: Any, mass: Any, m: Any, end: Any) -> None:
    """Ends of the runs that share the integral of density^(1/3) equally; none is empty."""
    count = end.shape[0] - 1
    total = 0.0
    for i in range(m - 1):
        gap = value[i + 1] - value[i]
        total += np.cbrt((mass[i] + mass[i + 1]) * gap * gap)
    passed, i = 0.0, 0
    end[0], end[count] = 0, m
    for k in range(1, count):
        while i < m - 1 and (passed < total * k / count or i <= end[k - 1]):
            gap = value[i + 1] - value[i]
            passed += np.cbrt((mass[i] + mass[i + 1]) * gap * gap)
            i += 1
        end[k] = min(i, m - count + k)


@inlined
def _best_runs(below: Any, moment: Any, short: Any, end: Any, room: Any) -> None:
    """Ends of the runs, made of short ones, that explain most.

    best[k, j], what k + 1 runs explain of the first j short ones, comes from best[k - 1, i] and one more run; the best i
    grows with j (Wu 1991), so it lies between those of the neighbours on either side, found before at twice the step.
    """
    (best, next_best), start = room
    count, runs = end.shape[0] - 1, short.shape[0] - 1
    best[0] = 0.0
    for j in range(1, runs + 1):
        best[j] = moment[short[j]] * moment[short[j]] / below[short[j]]
    step = 1
    while step <= runs:
        step *= 2
    for k in range(1, count):
        stride = step
        while stride > 0:
            for j in range(stride, runs + 1, 2 * stride):
                if j <= k:  # a run for each
                    start[k, j] = max(j - 1, 0)
                    next_best[j] = best[j]
                    continue
                low = max(start[k, j - stride], k) if j - stride > k else k
                high = min(start[k, j + stride], j - 1) if j + stride <= runs else j - 1
                top = -1.0
                for i in range(low, high + 1):
                    p = moment[short[j]] - moment[short[i]]
                    explained = best[i] + p * p / (below[short[j]] - below[short[i]])
                    if explained > top:
                        top, start[k, j] = explained, i
                next_best[j] = top
            stride //= 2
        best[: runs + 1] = next_best[: runs + 1]
    j = runs
    end[count] = short[runs]
    for k in range(count - 1, 0, -1):
        j = start[k, j]
        end[k] = short[j]
    end[0] = 0


@inlined
def _lloyd(value: Any, below: Any, moment: Any, m: Any, energy: Any, level: Any, end: Any) -> None:
    """Levels that are means of the values nearest to them, from the runs end[k]..end[k + 1]."""
    count = level.shape[0]
    last = np.inf
    for _ in range(ROUNDS):
        explained = 0.0
        for k in range(count):
            mass = below[end[k + 1]] - below[end[k]]
            if mass > 0:  # an empty run keeps its level
                level[k] = (moment[end[k + 1]] - moment[end[k]]) / mass
                explained += level[k] * level[k] * mass
        error = max(energy - explained, 0.0)
        if last - error <= SETTLED * error:
            break
        last = error
        for k in range(1, count):
            middle = 0.5 * (level[k - 1] + level[k])
            i = max(end[k], end[k - 1])
            while i < m and value[i] <= middle:
                i += 1
            while i > end[k - 1] and value[i - 1] > middle:
                i -= 1
            end[k] = i


@exact
def nearest_levels(x: Any, levels: Any, n: Any) -> npt.NDArray[np.uint8]:
    """Index of the level nearest to every weight, uint8 [rows, columns]; halfway, the lower one.

    Args:
        levels: ascending, [rows, groups, count].
        n: columns of a group; the last may be shorter.
    """
    rows, columns = x.shape
    count = levels.shape[2]
    out = np.empty((rows, columns), dtype=np.uint8)
    bounds = np.empty(count - 1, dtype=np.float32)
    index = np.empty(BATCH, dtype=np.int32)
    half = np.float32(0.5)
    for row in range(rows):
        for group in range(levels.shape[1]):
            for k in range(count - 1):
                bounds[k] = half * levels[row, group, k] + half * levels[row, group, k + 1]
            for start in range(group * n, min((group + 1) * n, columns), BATCH):
                part = x[row, start : min(start + BATCH, (group + 1) * n, columns)]
                m = part.shape[0]
                for i in range(m):
                    index[i] = 0
                if count <= FEW:
                    for k in range(count - 1):
                        bound = bounds[k]
                        for i in range(m):
                            index[i] += 1 if part[i] > bound else 0
                else:
                    step = count >> 1
                    while step > 0:
                        for i in range(m):
                            index[i] += step if part[i] > bounds[index[i] + step - 1] else 0
                        step >>= 1
                for i in range(m):
                    out[row, start + i] = index[i]
    return out
