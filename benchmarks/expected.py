"""Errors that number formats must have on Gaussian weights, worked out without Poise's code.

A block of I normal weights is divided by its largest magnitude m, which has the density
f_I(m) = 2 I phi(m) (2 Phi(m) - 1)^(I - 1); the others are normal, cut off at m. With levels v and the rounding q the
relative squared error is

    (I - 1) / I  integral f_I(m)  integral_{-m}^{m} phi(w) (w - m q(w / m))^2 dw / (2 Phi(m) - 1)  dm,

where one weight of the block, the largest, is exact. NF4 prints its levels,
BOF4 the procedure that gives them, PowerQuant the companding and the objective for its exponent.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

Doubles = npt.NDArray[np.float64]
Rounding = Callable[[Doubles], Doubles]

LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Bits -> mean squared error of the best levels for a normal variable (Max 1960, table I)."""
LLOYD_MAX_TERNARY = 0.1902
"""Three levels, the same table."""

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""QLoRA (Dettmers et al. 2023), appendix E."""


def blockwise_error(rounding: Rounding, block: int) -> float:
    """Relative squared error of blocks of normal weights that are divided by their largest magnitude."""
    u = np.linspace(-1, 1, 4001)
    m = np.linspace(0.5, 6.5, 241)
    inside = torch.special.erf(torch.from_numpy(m) / 2**0.5).numpy()
    normal = np.exp(-m * m / 2) / (2 * np.pi) ** 0.5
    density = 2 * block * normal * inside ** (block - 1)
    squared = np.square(u - rounding(u))
    within = np.empty_like(m)
    for i, largest in enumerate(m):
        weights = np.exp(-np.square(largest * u) / 2) / (2 * np.pi) ** 0.5
        within[i] = largest**3 * np.trapezoid(weights * squared, u) / inside[i]
    return float((block - 1) / block * np.trapezoid(density * within, m) / np.trapezoid(density, m))


def nearest(levels: npt.ArrayLike) -> Rounding:
    """Rounding to the nearest level."""
    values = np.sort(np.asarray(levels, dtype=np.float64))
    middles = (values[1:] + values[:-1]) / 2
    return lambda u: values[np.searchsorted(middles, u)]


def bof4_levels(block: int, signed: bool, blocks: int = 40_000) -> Doubles:
    """BOF4 as its authors make it (Blumenberg et al. 2025, arXiv 2505.06653): expectation maximization on drawn blocks.

    Each level becomes the mean of the weights nearest to it, weighed by m^2; 0 and 1 stay, and -1 if it is a level.
    """
    drawn = np.random.default_rng(0).standard_normal((blocks, block))
    place = np.abs(drawn).argmax(1)[:, None]
    largest = np.take_along_axis(drawn, place, 1)
    scaled = drawn / (largest if signed else np.abs(largest))
    np.put_along_axis(scaled, place, np.nan, 1)
    u, w = scaled.ravel(), np.broadcast_to(largest**2, scaled.shape).ravel()
    order = np.argsort(u)[: -blocks or None]  # NaN, the largest of each block, sorts last
    u, w = u[order], w[order]
    mass, moment = (np.concatenate(([0.0], np.cumsum(part))) for part in (w, w * u))
    levels = np.array(NF4)
    fixed = [7, 15] if signed else [0, 7, 15]
    for _ in range(2000):
        edges = np.concatenate(([0], np.searchsorted(u, (levels[1:] + levels[:-1]) / 2), [len(u)]))
        centroids = np.diff(moment[edges]) / np.diff(mass[edges])
        centroids[fixed] = levels[fixed]
        levels = centroids
    return levels


def power_error(bits: int, block: int) -> float:
    """PowerQuant (Yvinec et al. 2023, arXiv 2301.09858): uniform steps of sign(u) |u|^a, at the best exponent a."""
    top = 2 ** (bits - 1) - 1

    def error(exponent: float) -> float:
        return blockwise_error(
            lambda u: np.sign(u) * (np.round(np.abs(u) ** exponent * top) / top) ** (1 / exponent), block
        )

    return min(error(exponent) for exponent in np.linspace(0.4, 1.0, 13))
