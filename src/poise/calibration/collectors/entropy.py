"""The range that loses least information, as TensorRT calibrates activations."""

from dataclasses import dataclass

from poise.calibration.collectors._range import Histogrammed
from poise.core.errors import UsageError
from poise.core.histogram import Histogram
from poise.core.ranges import Range, entropy_range


@dataclass(kw_only=True, eq=False)
class Entropy(Histogrammed):
    """``low`` and ``high`` [channels]: the values clipped to them have the least divergence from what a grid tells apart.

    See ``core.ranges.entropy_range``. It wants many values: of a few hundred the histogram is mostly gaps.

    Attributes:
        bits: of the grid.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 8:
            raise UsageError(f"{self.name}: bits is 2 to 8, got {self.bits!r}")

    def _range(self, histogram: Histogram) -> Range:
        return entropy_range(histogram, self.bits, self.symmetric)
