"""Histograms of streams of unknown range. They widen by powers of two, so that order and batches leave no trace.

Bins of a channel cut [-2^e, 2^e) into equal parts, 2^e the power of two above the largest size seen. When a larger value
comes, e grows and neighbouring bins are joined: their edges are among the old ones, so the counts are those that a
histogram of the final range would have had from the beginning.

A bin is at most 2 / ``bins`` of the largest absolute value wide. That is the error of a quantile.
"""

from copy import copy

import torch
from torch import Tensor

from poise.core.distribution import Distribution
from poise.core.slabs import map_slabs

SMALLEST = -100
"""Least exponent: values below 2^-100 are as good as zero, and the scale of bins stays within float32."""

SLAB = 1 << 22
"""Values that are counted at a time: their bin numbers are int64."""


class Histogram(Distribution):
    """Counts of ``channels`` streams.

    Args:
        bins: on either side of zero; a power of two.

    Attributes:
        counts: [channels, 2 bins] int64; bin i holds values from (i - bins) to (i + 1 - bins) times the width.
        exponent: e, [channels] int64.
        total: values in each channel.
    """

    def __init__(self, channels: int, bins: int) -> None:
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"a histogram has a power of two of bins on either side, got {bins}")
        self.bins = bins
        self.counts = torch.zeros(channels, 2 * bins, dtype=torch.int64)
        self.exponent = torch.full((channels,), SMALLEST, dtype=torch.int64)
        self.low = torch.full((channels,), torch.inf, dtype=torch.float64)
        self.high = -self.low
        self.total = 0

    @property
    def width(self) -> Tensor:
        """Of a bin, float64 [channels]."""
        return torch.ldexp(torch.ones(len(self.exponent), dtype=torch.float64), self.exponent) / self.bins

    def add(self, values: Tensor) -> None:
        """Counts values, [channels, n] floating, finite; n may be zero."""
        channels, n = values.shape
        if not n:
            return
        low, high = torch.aminmax(values, dim=1)
        self.low, self.high = self.low.minimum(low.double()), self.high.maximum(high.double())
        largest = self.low.abs().maximum(self.high.abs())
        self._widen(torch.where(largest > 0, torch.frexp(largest)[1].long(), SMALLEST))
        self.total += n
        scale = (1 / self.width).float().unsqueeze(1)  # a power of two: products are exact
        first = (torch.arange(channels) * 2 * self.bins + self.bins).unsqueeze(1)
        step = max(1, SLAB // channels)
        for start in range(0, n, step):
            place = (values[:, start : start + step].float() * scale).floor_().long().add_(first)
            self.counts += torch.bincount(place.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, exponent: Tensor) -> None:
        """To these exponents, where they are larger."""
        shift = (exponent - self.exponent).clamp(min=0)
        if self.total and bool(shift.any()):
            place = (torch.arange(2 * self.bins) - self.bins) >> shift.clamp(max=62).unsqueeze(1)
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, place + self.bins, self.counts)
        self.exponent = self.exponent.maximum(exponent)

    def merge(self, other: "Histogram") -> None:
        """Takes in the counts of a histogram of as many channels and bins, which stays as it is."""
        theirs = copy(other)
        theirs._widen(self.exponent)
        self._widen(other.exponent)
        self.counts = self.counts + theirs.counts
        self.low, self.high = self.low.minimum(other.low), self.high.maximum(other.high)
        self.total += other.total

    def sizes(self) -> Tensor:
        """Counts of absolute values, [channels, bins]."""
        return self.counts[:, self.bins :] + self.counts[:, : self.bins].flip(1)

    def quantile(self, share: float) -> Tensor:
        found = _ranked(self.counts, share * (self.total - 1)) - self.bins
        return (found * self.width).clamp(self.low, self.high)

    def quantile_of_size(self, share: float) -> Tensor:
        found = _ranked(self.sizes(), share * (self.total - 1))
        return (found * self.width).clamp(max=self.low.abs().maximum(self.high.abs()))

    def error(self, low: Tensor, high: Tensor, levels: int) -> Tensor:
        """As if values were spread evenly over their bins."""
        # In steps from the lowest level: the integral of the squared distance to the nearest level is a twelfth a
        # level, and a third of the cube of what is left.
        step = (high - low) / max(1, levels - 1)
        safe = torch.where(step > 0, step, 1)
        last = torch.where(step > 0, levels - 1.0, 0.0)
        bin_ = self.width / safe
        places = torch.arange(-self.bins, self.bins + 1, dtype=torch.float64)

        def work(channels: slice) -> Tensor:
            edge = places * bin_[channels, None] - (low / safe)[channels, None]
            nearest = edge.round().clamp_(min=0).minimum(last[channels, None])
            rest = edge.sub_(nearest)
            integral = nearest.div_(12).addcmul_(rest.square(), rest, value=1 / 3)
            return integral.diff(dim=1).mul_(self.counts[channels]).sum(1)

        summed = torch.cat(map_slabs(work, len(self.counts), 2 * self.bins))
        return summed / bin_ * safe.square() / self.total

    def histogram(self) -> "Histogram":
        return self


def _ranked(counts: Tensor, rank: float) -> Tensor:
    """Where the value of a rank lies, in bins from the left: between whole ranks by straight lines."""
    below = int(rank)
    until = counts.cumsum(1)

    def place(number: int) -> Tensor:
        found = torch.searchsorted(until, torch.full((len(counts), 1), number), right=True)
        here = counts.gather(1, found)
        before = until.gather(1, found) - here
        return (found + (number - before + 0.5) / here).squeeze(1).double()

    first = place(below)
    if rank == below:
        return first
    return first + (place(below + 1) - first) * (rank - below)
