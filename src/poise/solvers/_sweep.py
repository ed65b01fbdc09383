"""Error feedback and coordinate descent for scalar formats, compiled: a row at a time, on ladders of values.

A ladder holds, for a row and a group of columns, the values of all codes: [rows, groups, levels]. Here each is
ascending. Ties go to the lower level.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.kernels import fast, inlined

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
def sweep(w: Floats, upper: Floats, ladders: Floats, group: Ints, index: Ints, error: Floats) -> None:
    """Rounds the columns of a panel in turn and carries each error to the columns of the panel that follow.

    Args:
        w: [rows, n], what is to be rounded; changed in place.
        upper: [n, n], the panel's part of the upper Cholesky factor of the inverse Hessian.
        ladders: [rows, groups, levels], ascending.
        group: [n], which ladder a column has.
        index: [rows, n], receives the positions in the ladders.
        error: [rows, n], receives (w - w') / upper[j, j], for the columns beyond the panel.
    """
    rows, n = w.shape
    for r in range(rows):
        row = w[r]
        for j in range(n):
            ladder = ladders[r, group[j]]
            k = nearest(ladder, row[j])  # type: ignore[no-untyped-call]
            index[r, j] = k
            e = (row[j] - ladder[k]) / upper[j, j]
            error[r, j] = e
            line = upper[j]
            for i in range(j + 1, n):
                row[i] -= e * line[i]


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
