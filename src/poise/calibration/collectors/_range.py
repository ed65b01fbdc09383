"""What collectors of ranges share: which values make a channel, and the histogram of them."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from poise.core.collector import Collector
from poise.core.errors import PoiseError, UsageError
from poise.core.histogram import Histogram
from poise.core.ranges import Range


@dataclass(kw_only=True, eq=False)
class Extremes(Collector):
    """``low`` and ``high`` [channels], of values of either sign.

    Attributes:
        axis: what has a range of its own: None for nothing but the tensor, 1 for every column (a channel of activations),
            0 for every row. With 0 all calls bring the same rows, such as the outputs of a weight.
    """

    axis: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in (None, 0, 1):
            raise UsageError(f"{self.name}: axis is None, 0 (rows) or 1 (columns), got {self.axis!r}")
        self._channels = {None: 1, 0: 0, 1: self.columns}[self.axis]
        self._low = torch.empty(0)
        self._high = torch.empty(0)

    def _add(self, *tensors: Tensor) -> None:
        x = tensors[0]
        values = x.reshape(1, -1) if self.axis is None else x if self.axis == 0 else x.T
        if self._channels not in (0, len(values)):
            raise PoiseError(f"{self.name}: ranges of {self._channels} rows, got {len(values)} rows")
        self._channels = len(values)
        self._take(values)

    def _take(self, values: Tensor) -> None:
        """Values by channel, [channels, n], n > 0."""
        low, high = torch.aminmax(values.float(), dim=1)
        self._grow(low, high)

    def _grow(self, low: Tensor, high: Tensor) -> None:
        self._low = low if not len(self._low) else self._low.minimum(low)
        self._high = high if not len(self._high) else self._high.maximum(high)

    def _merge(self, other: Self) -> None:
        if other.n_tokens:
            self._same_channels(other)
            self._grow(other._low, other._high)

    def _same_channels(self, other: Self) -> None:
        if self._channels not in (0, other._channels):
            raise PoiseError(f"{self.name}: ranges of {self._channels} rows, {other.name}: {other._channels}")
        self._channels = other._channels

    def _result(self) -> dict[str, Tensor]:
        return {"low": self._low, "high": self._high}


@dataclass(kw_only=True, eq=False)
class Histogrammed(Extremes):
    """A range from a histogram. Its resolution is 2 / ``bins`` of the largest absolute value of the channel, at worst.

    Memory: 16 bytes a bin and channel.

    Attributes:
        symmetric: whether the range is.
        bins: on either side of zero, a power of two; 0 for 8192 of a tensor and 512 of a channel.
    """

    symmetric: bool = True
    bins: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins and (self.bins < 2 or self.bins & (self.bins - 1)):
            raise UsageError(f"{self.name}: bins is a power of two, got {self.bins}")
        self._histogram: Histogram | None = None

    def _take(self, values: Tensor) -> None:
        if self._histogram is None:
            bins = self.bins or (8192 if self.axis is None else 512)
            self._histogram = Histogram(len(values), bins)
        self._histogram.add(values)

    def _merge(self, other: Self) -> None:
        if other._histogram is not None:
            self._same_channels(other)
            if self._histogram is None:
                self._histogram = Histogram(other._channels, other._histogram.bins)
            self._histogram.merge(other._histogram)

    def _result(self) -> dict[str, Tensor]:
        assert self._histogram is not None  # there were tokens
        return self._range(self._histogram)._asdict()

    @abstractmethod
    def _range(self, histogram: Histogram) -> Range:
        """Of at least one value a channel."""
