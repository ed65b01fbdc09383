"""The range of least squared rounding error."""

from dataclasses import dataclass

from poise.calibration.collectors._range import Histogrammed
from poise.core.errors import UsageError
from poise.core.histogram import Histogram
from poise.core.ranges import Range, mse_range


@dataclass(kw_only=True, eq=False)
class Mse(Histogrammed):
    """``low`` and ``high`` [channels]: 2^bits equal steps between them have the least mean squared error.

    Values count as spread evenly over their bin of the histogram.

    Attributes:
        bits: of the grid.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 16:
            raise UsageError(f"{self.name}: bits is 1 to 16, got {self.bits!r}")

    def _range(self, histogram: Histogram) -> Range:
        return mse_range(histogram, 2**self.bits, self.symmetric)
