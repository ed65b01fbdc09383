"""Weights as places on the ladder of their group: 3.25 is a quarter of the way from the fourth value to the fifth.

What learns to round works with places, whatever the distances between a format's values: integers, floats, K-quants
and codebooks are alike. Beyond the ends of a ladder the outermost distance goes on.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.kernels import fast

Floats = NDArray[np.float32]
Ints = NDArray[Any]


@fast
def locate(weight: Floats, ladders: Floats, group: Ints, place: Floats) -> None:
    """Places of weights.

    Args:
        weight: [rows, n].
        ladders: [rows, groups, levels], ascending.
        group: [n], which ladder a column has.
        place: [rows, n], receives them.
    """
    rows, n = weight.shape
    last = ladders.shape[2] - 1
    for r in range(rows):
        for j in range(n):
            ladder = ladders[r, group[j]]
            low, high = 0, last
            while high - low > 1:
                middle = (low + high) >> 1
                if ladder[middle] <= weight[r, j]:
                    low = middle
                else:
                    high = middle
            gap = ladder[high] - ladder[low]
            # A group that is one value leaves nothing to choose.
            place[r, j] = low + (weight[r, j] - ladder[low]) / gap if gap > 0 else low


@fast
def settle(place: Floats, ladders: Floats, group: Ints, index: Ints, value: Floats, gap: Floats) -> None:
    """Levels nearest to places, their values, and how fast the value would change with the place if it did not jump.

    Args:
        place: [rows, n].
        index: [rows, n], receives the levels.
        value: [rows, n], receives their values.
        gap: [rows, n], receives the distance of the two levels around the place; zero where it is beyond the ends.
    """
    rows, n = place.shape
    last = ladders.shape[2] - 1
    for r in range(rows):
        for j in range(n):
            ladder = ladders[r, group[j]]
            k = int(np.floor(place[r, j] + np.float32(0.5)))
            outside = k < 0 or k > last
            k = min(max(k, 0), last)
            low = min(max(int(np.floor(place[r, j])), 0), last - 1)
            index[r, j] = k
            value[r, j] = ladder[k]
            gap[r, j] = 0 if outside else ladder[low + 1] - ladder[low]


@fast
def lean(
    gradient: Floats, place: Floats, index: Ints, parts: Floats, group: Ints, entry: Ints, slope: Floats
) -> None:
    """Gradient for the entries of a linear parameter, straight through the rounding.

    With q the level and p the place, the value changes with the parameter as what it multiplies at q, less the same at
    p, since the place moves as well; beyond the ends the level is what it is.

    Args:
        gradient: [rows, n], of the loss for the values.
        place: [rows, n], of the weights themselves.
        index: [rows, n].
        parts: [rows, groups, levels], what the parameter multiplies.
        entry: [n], which of the parameter's entries a column has.
        slope: [rows, entries], zeros, receives the gradient.
    """
    rows, n = gradient.shape
    last = parts.shape[2] - 1
    for r in range(rows):
        for j in range(n):
            part = parts[r, group[j]]
            change = part[index[r, j]]
            p = place[r, j]
            if np.float32(-0.5) <= p <= last + np.float32(0.5):
                low = min(max(int(np.floor(p)), 0), last - 1)
                change -= part[low] + (p - low) * (part[low + 1] - part[low])
            slope[r, entry[j]] += gradient[r, j] * change


@fast
def collect(gradient: Floats, index: Ints, parts: Floats, group: Ints, entry: Ints, slope: Floats) -> None:
    """Gradient for the entries of a linear parameter, levels given.

    Args:
        gradient: [rows, n], of the loss for the values.
        index: [rows, n].
        parts: [rows, groups, levels], what the parameter multiplies.
        entry: [n], which of the parameter's entries a column has.
        slope: [rows, entries], zeros, receives the gradient.
    """
    rows, n = gradient.shape
    for r in range(rows):
        for j in range(n):
            slope[r, entry[j]] += gradient[r, j] * parts[r, group[j], index[r, j]]
