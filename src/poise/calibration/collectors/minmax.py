"""The range from the smallest value to the largest."""

from dataclasses import dataclass

from poise.calibration.collectors._range import Extremes


@dataclass(kw_only=True, eq=False)
class Minmax(Extremes):
    """``low`` and ``high`` [channels], the extremes of each channel; exact."""
