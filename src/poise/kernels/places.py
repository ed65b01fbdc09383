"""Weights as places on the ladder of their group: 3.25 is a quarter of the way from the fourth value to the fifth.

What learns to round works with places, whatever the distances between a format's values: integers, floats, K-quants
and codebooks are alike. Beyond the ends of a ladder the outermost distance goes on.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.kernels import fast, inlined

Floats = NDArray[np.float32]
Ints = NDArray[Any]


@inlined
def _level(place: np.float32, last: np.int32) -> np.uint32:
    """The level nearest to a place; unsigned, so that no index can count from the end."""
    k = np.int32(np.floor(place + np.float32(0.5)))
    return np.uint32(min(max(k, np.int32(0)), last))


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
def pick(index: Ints, codes: Ints, group: Ints, found: Ints) -> None:
    """Codes of levels.

    Args:
        index: [rows, n] uint8, the levels.
        codes: [rows, groups, levels].
        group: [n], which ladder a column has.
        found: [rows, n], receives the codes.
    """
    rows, n = index.shape
    for r in range(rows):
        line = codes[r]
        for j in range(n):
            found[r, j] = line[group[j], index[r, j]]


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
def values_at(place: Floats, ladders: Ints, wide: int, value: Ints) -> None:
    """Values of the levels nearest to places.

    Args:
        place: [rows, n].
        ladders: [rows, groups, levels], bfloat16 as its 16 bits.
        wide: columns of a group.
        value: [rows, n], receives them, bfloat16 as its 16 bits.
    """
    rows, n = place.shape
    last = np.int32(ladders.shape[2] - 1)
    for r in range(rows):
        for start in range(0, n, wide):
            ladder = ladders[r, start // wide]
            for j in range(start, min(start + wide, n)):
                value[r, j] = ladder[_level(place[r, j], last)]


@fast
def pass_through(gradient: Ints, place: Floats, ladders: Floats, wide: int, slope: Floats) -> None:
    """Gradient for places, as if values did not jump: times the distance of the two levels around; zero beyond the ends.

    Args:
        gradient: [rows, n], of the loss for the values, bfloat16 as its 16 bits.
        place: [rows, n].
        ladders: [rows, groups, levels], ascending.
        wide: columns of a group.
        slope: [rows, n], receives it.
    """
    rows, n = place.shape
    last = np.int32(ladders.shape[2] - 1)
    bits = np.empty(n, np.uint32)
    line = bits.view(np.float32)
    gaps = np.empty(last, np.float32)
    for r in range(rows):
        for j in range(n):
            bits[j] = np.uint32(gradient[r, j]) << np.uint32(16)
        for start in range(0, n, wide):
            ladder = ladders[r, start // wide]
            for k in range(last):
                gaps[k] = ladder[k + 1] - ladder[k]
            for j in range(start, min(start + wide, n)):
                p = place[r, j]
                level = np.int32(np.floor(p + np.float32(0.5)))
                inside = (level >= np.int32(0)) & (level <= last)
                gap = gaps[np.uint32(min(max(np.int32(np.floor(p)), np.int32(0)), last - np.int32(1)))]
                slope[r, j] = line[j] * (gap if inside else np.float32(0))


@fast
def collect(gradient: Ints, place: Floats, parts: Floats, wide: int, entry: Ints, slope: Floats) -> None:
    """Gradient for the entries of a linear parameter, levels given.

    Args:
        gradient: [rows, n], of the loss for the values, bfloat16 as its 16 bits.
        place: [rows, n].
        parts: [rows, groups, levels], what the parameter multiplies.
        wide: columns of a group.
        entry: [groups], which of the parameter's entries a group has.
        slope: [rows, entries], zeros, receives the gradient.
    """
    rows, n = place.shape
    last = np.int32(parts.shape[2] - 1)
    bits = np.empty(n, np.uint32)
    line = bits.view(np.float32)
    for r in range(rows):
        for j in range(n):
            bits[j] = np.uint32(gradient[r, j]) << np.uint32(16)
        for start in range(0, n, wide):
            part = parts[r, start // wide]
            total = np.float32(0)
            for j in range(start, min(start + wide, n)):
                total += line[j] * part[_level(place[r, j], last)]
            slope[r, entry[start // wide]] += total
