"""Error feedback and coordinate descent for scalar formats, compiled, on ladders of values.

A ladder holds, for a row and a group of columns, the values of all codes, here in ascending order. Ties go to the lower
level.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.kernels import fast, finite, inlined

ROWS = 64
"""Rows that are swept side by side: a panel of them stays in the first-level cache."""
TOGETHER = 8
"""Columns whose errors go to those that follow in one pass; the sum is written out."""
FEW = 32
"""Levels up to which comparing with all of them is faster than a binary search, which does not vectorise."""
NEAR = np.float32(0.4)
"""What a move of one code may cost, as a share of d^2 H_ii, to be tried together with another: few that cost more gain."""
SURE = np.float32(1e-6)
"""Gain of two moves, as a share of d^2 H_ii, that rounding leaves no doubt about."""
FAR = np.float32(1e30)
"""A cost that nothing makes up for."""

Floats = NDArray[np.float32]
Ints = NDArray[Any]


@inlined
def nearest(ladder, value):  # type: ignore[no-untyped-def]
    """Index of the value nearest to this one in an ascending ladder."""
    low, high = 0, len(ladder) - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if ladder[middle] <= value:
            low = middle
        else:
            high = middle
    return high if ladder[high] - value < value - ladder[low] else low


@fast
def sweep(w: Floats, target: Floats, feedback: Floats, ladders: Floats, group: Ints, index: Ints) -> None:
    """Rounds the columns of a panel in turn; each error goes to the targets of the panel's columns that follow.

    Rows go side by side, a few at a time, so that every loop inside is over neighbours in memory. Columns that come much
    later get the errors of a few columns at once.

    Args:
        w: [n, rows], the weights; becomes what each loses, w - w'.
        target: [n, rows], the weights and what the panels before have lost of them.
        feedback: [n, n], the panel's part of R, its columns divided by their diagonals.
        ladders: [groups, levels, rows], ascending.
        group: [n], which ladder a column has.
        index: [n, rows], receives the positions in the ladders.
    """
    n, rows = w.shape
    levels = ladders.shape[1]
    work, lost = np.empty((n, ROWS), np.float32), np.zeros((TOGETHER, ROWS), np.float32)
    best, place = np.empty(ROWS, np.float32), np.empty(ROWS, np.int32)
    share = np.zeros(TOGETHER, np.float32)
    for first in range(0, rows, ROWS):
        count = min(ROWS, rows - first)
        for j in range(n):
            line = target[j, first:]
            for r in range(count):
                work[j, r] = line[r]
        for start in range(0, n, TOGETHER):
            stop = min(start + TOGETHER, n)
            for j in range(start, stop):
                here, values = work[j], ladders[group[j]]
                if levels <= FEW:
                    lowest = values[0, first:]
                    for r in range(count):
                        best[r], place[r] = lowest[r], np.int32(0)
                    for k in range(1, levels):
                        level, number = values[k, first:], np.int32(k)
                        for r in range(count):
                            value = level[r]
                            nearer = value - here[r] < here[r] - best[r]
                            best[r] = value if nearer else best[r]
                            place[r] = number if nearer else place[r]
                else:
                    for r in range(count):
                        place[r] = nearest(values[:, first + r], here[r])  # type: ignore[no-untyped-call]
                        best[r] = values[place[r], first + r]
                own, left, kept = lost[j - start], w[j, first:], index[j, first:]
                for r in range(count):
                    own[r] = left[r] - best[r]
                    left[r] = own[r]
                    kept[r] = place[r]
                for i in range(j + 1, stop):
                    after, alone = work[i], feedback[j, i]
                    for r in range(count):
                        after[r] += alone * own[r]
            for i in range(stop, n):
                after = work[i]
                for j in range(TOGETHER):  # those beyond the end have no columns after them
                    share[j] = feedback[start + j, i]
                for r in range(count):
                    after[r] += (
                        (share[0] * lost[0, r] + share[1] * lost[1, r])
                        + (share[2] * lost[2, r] + share[3] * lost[3, r])
                    ) + (
                        (share[4] * lost[4, r] + share[5] * lost[5, r])
                        + (share[6] * lost[6, r] + share[7] * lost[7, r])
                    )


@fast
def descend(
    value: Floats, gradient: Floats, hessian: Floats, ladders: Floats, group: Ints, index: Ints, passes: int
) -> None:
    """Moves codes one by one to where the squared error under the Hessian is least, until none moves.

    With e = w - w' the objective of a row is e H e^T and the gradient here is e H. For a column alone the best value
    is w'_j + (e H)_j / H_jj; the nearest of its ladder is taken if it lowers the objective.

    Args:
        value: [rows, n], the decoded weights w'; changed in place, like ``gradient`` and ``index``.
        gradient: [rows, n], (w - w') H.
        hessian: [n, n], symmetric.
    """
    rows, n = value.shape
    for r in range(rows):
        slope = gradient[r]
        for _ in range(passes):
            moved = False
            for j in range(n):
                stiff = hessian[j, j]
                if stiff <= 0:
                    continue
                ladder = ladders[r, group[j]]
                step = slope[j] / stiff
                k = nearest(ladder, value[r, j] + step)  # type: ignore[no-untyped-call]
                if k == index[r, j]:
                    continue
                delta = ladder[k] - value[r, j]
                if delta * delta * stiff >= np.float32(1.999999) * delta * slope[j]:
                    continue
                index[r, j] = k
                value[r, j] = ladder[k]
                moved = True
                line = hessian[j]
                for i in range(n):
                    slope[i] -= delta * line[i]
            if not moved:
                break


@finite
def pair(
    value: Floats, gradient: Floats, hessian: Floats, ladders: Floats, group: Ints, index: Ints, passes: int
) -> None:
    """Moves codes two at a time, by a level each towards where the gradient points, until no two gain.

    A move of d changes the objective of a row by c = d^2 H_ii - 2 d (e H)_i, two by c_i + c_j + 2 d_i d_j H_ij. Where
    ``descend`` has ended no c is below zero, and the sum still may be.

    Args: as those of ``descend``.
    """
    rows, n = value.shape
    where, moves, costs = np.empty(n, np.int32), np.empty(n, np.float32), np.empty(n, np.float32)
    for r in range(rows):
        slope, ladder = gradient[r], ladders[r]
        for _ in range(passes):
            moved = False
            count = _cheap(value[r], slope, hessian, ladder, group, index[r], where, moves, costs)  # type: ignore[no-untyped-call]
            for a in range(count - 1):
                line, twice = hessian[where[a]], 2 * moves[a]
                wanted = -SURE * moves[a] * moves[a] * line[where[a]] - costs[a]
                least = np.float32(0)
                for b in range(a + 1, count):
                    least = min(least, costs[b] + twice * moves[b] * line[where[b]])
                if least >= wanted:
                    continue
                least, partner = wanted, -1
                for b in range(a + 1, count):
                    change = costs[b] + twice * moves[b] * line[where[b]]
                    if change < least:
                        least, partner = change, b
                if partner < 0:
                    continue
                moved = True
                for chosen in (a, partner):
                    i, move = where[chosen], moves[chosen]
                    k = np.int64(index[r, i]) + (1 if move > 0 else -1)
                    index[r, i], value[r, i] = k, ladder[group[i], k]
                    across = hessian[i]
                    for j in range(n):
                        slope[j] -= move * across[j]
                    for b in range(a + 1, count):
                        costs[b] += 2 * move * moves[b] * across[where[b]]
                costs[partner] = FAR  # it has moved; in this pass not again
            if not moved:
                break


@inlined
def _cheap(value, slope, hessian, ladder, group, index, where, moves, costs):  # type: ignore[no-untyped-def]
    """How many columns can move towards their gradient for less than ``NEAR``; which, by how much, and what each costs."""
    count, top = 0, ladder.shape[1] - 1
    for i in range(len(value)):
        k = np.int64(index[i]) + (1 if slope[i] > 0 else -1)
        if 0 <= k <= top:
            move = ladder[group[i], k] - value[i]
            stiff = move * move * hessian[i, i]
            cost = stiff - 2 * move * slope[i]
            if cost < NEAR * stiff:
                where[count], moves[count], costs[count] = i, move, cost
                count += 1
    return count
