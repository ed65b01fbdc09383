"""How values are distributed, as far as ranges are chosen by it: all values at hand, or a histogram of a stream."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from poise.core.histogram import Histogram


class Distribution(ABC):
    """Of ``channels`` sets of values, at least one value in each. Figures are float64 [channels].

    Attributes:
        low, high: the extremes, exactly.
    """

    low: Tensor
    high: Tensor

    @abstractmethod
    def quantile(self, share: float) -> Tensor:
        """The value that ``share`` of the values are below, between order statistics by straight lines, as numpy does."""

    @abstractmethod
    def quantile_of_size(self, share: float) -> Tensor:
        """The same of absolute values."""

    @abstractmethod
    def error(self, low: Tensor, high: Tensor, levels: int) -> Tensor:
        """Mean squared error of rounding to ``levels`` equal steps from low to high, both [channels]; a range of no
        width is one level."""

    @abstractmethod
    def histogram(self) -> "Histogram":
        """Of these values."""


class Samples(Distribution):
    """Values at hand; quantiles and errors are exact.

    Args:
        values: [channels, n] floating, finite, n > 0.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        low, high = torch.aminmax(values, dim=1)
        self.low, self.high = low.double(), high.double()

    def quantile(self, share: float) -> Tensor:
        return _quantile(self.values, share)

    def quantile_of_size(self, share: float) -> Tensor:
        return _quantile(self.values.abs(), share)

    def error(self, low: Tensor, high: Tensor, levels: int) -> Tensor:
        first = low.float().unsqueeze(1)
        step = ((high - low) / max(1, levels - 1)).float().unsqueeze(1)
        safe = torch.where(step > 0, step, 1)
        level = ((self.values - first) / safe).round_().clamp_(0, levels - 1)
        return (level.mul_(step).add_(first) - self.values).square_().mean(1, dtype=torch.float64)

    def histogram(self) -> "Histogram":
        from poise.core.histogram import Histogram

        few = max(32, self.values.shape[1])  # more bins than values would be mostly gaps
        made = Histogram(len(self.values), bins=min(512, 1 << few.bit_length()))
        made.add(self.values)
        return made


def _quantile(values: Tensor, share: float) -> Tensor:
    """Of any number of values: ``torch.quantile`` refuses more than 16 million."""
    place = share * (values.shape[1] - 1)
    below = min(int(place), values.shape[1] - 1)
    ordered = values.sort(dim=1).values
    first, second = ordered[:, below].double(), ordered[:, min(below + 1, values.shape[1] - 1)].double()
    return first + (second - first) * (place - below)
