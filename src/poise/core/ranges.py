"""Which range a grid should cover, from how values are distributed: the classic observers.

A wide range clips nothing and has coarse steps. A narrow one clips the extremes and is finer for the rest. A range is
(low, high), float64 [channels] each. Symmetric ones are (-t, t); others stay within the extremes of the values.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from poise.core.distribution import Distribution
from poise.core.errors import UsageError
from poise.core.slabs import map_slabs

NARROWEST = 2.0**-12
"""Of the full range, the least that is tried: outliers of a thousand standard deviations are cut off."""

RATIO = NARROWEST ** (1 / 48)
"""Between two tries of the coarse search; the finer ones come within a hundredth of the best share."""

ENTROPY_TRIES = 256
"""Thresholds that are compared, in equal ratios."""


class Range(NamedTuple):
    """What a grid covers, float64 [channels] each."""

    low: Tensor
    high: Tensor


RANGES = ("absmax", "minmax", "percentile", "mse", "entropy")
"""Names that ``range_by`` knows."""


def range_by(
    name: str, values: Distribution, *, bits: int, percentile: float = 99.9, symmetric: bool = True
) -> Range:
    """The range that an observer of this name takes.

    Args:
        bits: of the grid, for ``mse`` and ``entropy``.
        percentile: share of the values within the range, in percent, for ``percentile``.
        symmetric: about zero; ``absmax`` always is, ``minmax`` never.

    Raises:
        UsageError: no such observer.
    """
    if name == "absmax":
        return absmax(values)
    if name == "minmax":
        return Range(values.low, values.high)
    if name == "percentile":
        return percentile_range(values, percentile, symmetric)
    if name == "mse":
        return mse_range(values, 2**bits, symmetric)
    if name == "entropy":
        return entropy_range(values, bits, symmetric)
    raise UsageError(f"no range named {name!r}: there is {', '.join(RANGES)}")


def absmax(values: Distribution) -> Range:
    """The smallest symmetric range that holds all values."""
    size = values.low.abs().maximum(values.high.abs())
    return Range(-size, size)


def percentile_range(values: Distribution, percentile: float, symmetric: bool) -> Range:
    """All but the outermost values: of their sizes, or as many at either end."""
    inside = percentile / 100
    if symmetric:
        size = values.quantile_of_size(inside)
        return Range(-size, size)
    return Range(values.quantile((1 - inside) / 2), values.quantile((1 + inside) / 2))


def mse_range(values: Distribution, levels: int, symmetric: bool) -> Range:
    """The range of least squared error of rounding to ``levels`` equal steps, the outermost on its ends.

    Symmetric ranges shrink towards zero. Others shrink towards the median, first both ends in step, then either end in
    turn. For normal values the symmetric optimum is Max's uniform quantizer (1960).
    """
    if symmetric:
        size = values.low.abs().maximum(values.high.abs())
        share = _least(lambda t: values.error(-t * size, t * size, levels), len(size))
        return Range(-share * size, share * size)
    middle = values.quantile(0.5)
    below, above = values.low - middle, values.high - middle

    def error(low: Tensor, high: Tensor) -> Tensor:
        return values.error(middle + low * below, middle + high * above, levels)

    low = high = _least(lambda t: error(t, t), len(middle))
    for _ in range(2):
        high = _better(lambda t, low=low: error(low, t), high)  # type: ignore[misc]
        low = _better(lambda t, high=high: error(t, high), low)  # type: ignore[misc]
    return Range(middle + low * below, middle + high * above)


def _least(error: Callable[[Tensor], Tensor], channels: int) -> Tensor:
    """Shares of the full range, [channels] within (0, 1], where an error is least: a coarse search, then two finer."""
    best = torch.ones(channels, dtype=torch.float64)
    return _search(error, best, (RATIO ** torch.arange(49), _around(1), _around(1 / 8)))


def _around(steps: float) -> Tensor:
    """Factors of so many steps of the coarse search down and up, the middle one exactly 1."""
    factors: Tensor = RATIO ** (steps * torch.linspace(-1, 1, 17, dtype=torch.float64))
    return factors


def _search(error: Callable[[Tensor], Tensor], best: Tensor, ladders: tuple[Tensor, ...]) -> Tensor:
    """The best of some factors of the best so far, again and again."""
    for ladder in ladders:
        tries = (best.unsqueeze(1) * ladder).clamp(max=1).T
        errors = torch.stack([error(share) for share in tries])
        best = tries.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)
    return best


def _better(error: Callable[[Tensor], Tensor], now: Tensor) -> Tensor:
    """A share near the present one, which is among what is tried."""
    return _search(error, now, (_around(5), _around(1 / 2)))


def entropy_range(values: Distribution, bits: int, symmetric: bool) -> Range:
    """The range that loses least information: the smallest divergence of the values clipped to a threshold from the
    values as a grid of ``bits`` bits tells them apart.

    For a threshold after bin i, P is the histogram of sizes up to i, with all that lies beyond in the last bin. Q joins
    these bins into 2^(bits - 1) runs and spreads each run's count over its bins that are not empty. KL(P || Q) decides.
    (Migacz 2017, "8-bit inference with TensorRT"; the first bin counts as the second, lest zeros decide, as in NVIDIA's
    pytorch-quantization.) Deviations: thresholds in equal ratios instead of equal steps, down to an eighth of a bin a
    level, because one outlier may leave all else in few bins; a range that is not symmetric is what the threshold leaves
    of the extremes.
    """
    histogram = values.histogram()
    sizes = histogram.sizes().double()
    sizes[:, 0] = sizes[:, 1].minimum(sizes[:, 0])
    levels = 2 ** max(0, bits - 1)
    edges = _thresholds(min(max(2, levels // 8), sizes.shape[1]), sizes.shape[1])

    def best(channels: slice) -> Tensor:
        return _divergences(sizes[channels], edges, levels).argmin(1)

    chosen = torch.cat(map_slabs(best, *sizes.shape))
    edge = torch.tensor(edges, dtype=torch.float64)[chosen]
    largest = values.low.abs().maximum(values.high.abs())
    size = (edge * histogram.width).minimum(largest)
    if symmetric:
        return Range(-size, size)
    return Range(values.low.maximum(-size), values.high.minimum(size))


def _thresholds(first: int, last: int) -> list[int]:
    """Whole numbers from first to last, in equal ratios as far as there are so many."""
    ratio = (last / first) ** (1 / max(1, ENTROPY_TRIES - 1))
    return sorted({min(last, round(first * ratio**k)) for k in range(ENTROPY_TRIES)} | {last})


def _divergences(sizes: Tensor, edges: list[int], levels: int) -> Tensor:
    """KL(P || Q) for thresholds after so many bins, [channels, thresholds]; infinite where Q has nothing and P has.

    Q is the same in all bins of a run, so running sums of counts and of c log c are all that is needed.
    """
    parts = (sizes, (sizes > 0).double(), torch.xlogy(sizes, sizes))
    counts, used, logs = (torch.nn.functional.pad(part.cumsum(1), (1, 0)) for part in parts)
    total = counts[:, -1]
    found = []
    for edge in edges:
        runs = min(levels, edge)
        bounds = -(torch.arange(runs + 1) * edge).div(-runs, rounding_mode="floor")
        joined, filled = counts[:, bounds].diff(dim=1), used[:, bounds].diff(dim=1)
        mean = joined / filled.clamp(min=1)
        beyond, last = total - counts[:, edge], sizes[:, edge - 1]
        p_log_p = logs[:, edge - 1] + torch.xlogy(last + beyond, last + beyond)
        p_log_q = torch.xlogy(joined, mean).sum(1) + torch.xlogy(beyond, mean[:, -1])
        divergence = (p_log_p - p_log_q) / total + (counts[:, edge] / total).log()
        found.append(torch.where((last == 0) & (beyond > 0), torch.inf, divergence))
    return torch.stack(found, dim=1)
