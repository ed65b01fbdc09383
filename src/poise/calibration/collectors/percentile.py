"""The range of all but the outermost values."""

from dataclasses import dataclass

from poise.calibration.collectors._range import Histogrammed
from poise.core.errors import UsageError
from poise.core.histogram import Histogram
from poise.core.ranges import Range, percentile_range


@dataclass(kw_only=True, eq=False)
class Percentile(Histogrammed):
    """``low`` and ``high`` [channels]: ``percentile`` percent of the values are between them.

    Within 2 / ``bins`` of the largest absolute value of what numpy gives for all values together.

    Attributes:
        percentile: symmetric, of the sizes of the values; else the rest is cut off in halves, at either end.
    """

    percentile: float = 99.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.percentile <= 100:
            raise UsageError(f"{self.name}: percentile is above 0 and at most 100, got {self.percentile!r}")

    def _range(self, histogram: Histogram) -> Range:
        return percentile_range(histogram, self.percentile, self.symmetric)
