"""Ranges by the classic observers, rounding to nearest: what many tools call post-training quantization.

Every group's weights are clipped to the range that an observer takes, and the format covers what is left. See
``core.ranges`` for what the observers do.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.core.distribution import Samples
from poise.core.errors import UsageError
from poise.core.format import Format, Params, QTensor
from poise.core.ranges import RANGES, range_by
from poise.core.solver import Solver


@dataclass(frozen=True, kw_only=True)
class Observer(Solver):
    """Covers an observed range of each group and rounds to nearest. Needs no data.

    With ``absmax`` and ``minmax`` nothing is clipped: both are ``rtn``. Formats without a range to cover are fitted to the
    clipped weights. ``mse`` and ``entropy`` take the format for 2^bits equal steps, whatever its levels are.

    Attributes:
        range: ``absmax``, ``minmax``, ``percentile``, ``mse`` or ``entropy``.
        percentile: share of a group's weights within the range, in percent, for ``percentile``.
        symmetric: whether weights are clipped alike on both sides of zero.
    """

    range: str = "mse"
    percentile: float = 99.0
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.range not in RANGES:
            raise UsageError(f"range is {', '.join(RANGES)}, got {self.range!r}")
        if not 0 < self.percentile <= 100:
            raise UsageError(f"percentile is above 0 and at most 100, got {self.percentile!r}")

    def solve_slab(
        self, weight: Tensor, format: Format, shared: Any, start: QTensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Params]:
        params = format.cover(self._clipped(weight, format))
        return format.round(weight, params, noise=noise), params

    def _clipped(self, weight: Tensor, format: Format) -> Tensor:
        """Every group within its own range."""
        rows, columns = weight.shape
        wide = format.group_of(columns)
        # Formats that see all rows at once may share a scale between them, or only codebooks and second-level scales.
        tall = format.tile_rows or (rows if wide == columns else 1)
        clipped = torch.empty_like(weight)
        for down in _runs(rows, tall):
            for right in _runs(columns, wide):
                part = weight[down, right]
                high, across = min(tall, len(part)), min(wide, part.shape[1])
                tiles = part.reshape(-1, high, part.shape[1] // across, across).transpose(1, 2)
                values = tiles.reshape(-1, high * across)
                low, top = range_by(
                    self.range,
                    Samples(values),
                    bits=max(1, round(format.bits)),
                    percentile=self.percentile,
                    symmetric=self.symmetric,
                )
                values = values.clamp(low.float().unsqueeze(1), top.float().unsqueeze(1))
                clipped[down, right] = values.view(tiles.shape).transpose(1, 2).reshape(part.shape)
        return clipped


def _runs(total: int, step: int) -> list[slice]:
    """The part that is whole steps, and the rest; without the empty ones."""
    whole = total - total % step if step else 0
    return [slice(a, b) for a, b in ((0, whole), (whole, total)) if b > a]
