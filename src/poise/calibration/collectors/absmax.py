"""The range of the largest absolute value."""

from dataclasses import dataclass

from torch import Tensor

from poise.calibration.collectors._range import Extremes


@dataclass(kw_only=True, eq=False)
class Absmax(Extremes):
    """``low`` and ``high`` [channels], minus and plus the largest absolute value of each channel; exact."""

    def _result(self) -> dict[str, Tensor]:
        size = self._low.abs().maximum(self._high.abs())
        return {"low": -size, "high": size}
