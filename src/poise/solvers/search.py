"""The range of each group is chosen so that the squared error is smallest.

A wide range clips nothing but has coarse steps; a narrow one clips the extremes and is finer for the
rest. For every group the range is tried at several widths (negative: mirrored, for grids that are not
symmetric about zero), and each try is polished by alternating the codes with the least-squares scale,
as in Lloyd's algorithm. The best try of each group is kept, so the error is never above that of ``rtn``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.core.format import Format, Params
from poise.core.solver import Solver


@dataclass(frozen=True, kw_only=True)
class Search(Solver):
    """Minimises sum_j importance_j (w_j - w'_j)^2 over the columns j of each group.

    Attributes:
        tries: widths tried of each range.
        narrowest: smallest width, as a fraction of the full range.
        polish: rounds of (least-squares scale, nearest codes) for each width.
    """

    uses_stats: ClassVar[bool] = True

    tries: int = 12
    narrowest: float = 0.6
    polish: int = 1

    def __post_init__(self) -> None:
        if self.tries < 1 or self.polish < 0 or not 0 < self.narrowest <= 1:
            raise UsageError("search takes tries >= 1, polish >= 0 and 0 < narrowest <= 1")

    def solve_slab(self, weight: Tensor, format: Format, importance: Tensor | None) -> tuple[Tensor, Params]:
        best = format.fit(weight)
        if not best or weight.numel() == 0:
            return format.round(weight, best), best
        least = _error(weight, format, best, importance)
        for width in torch.linspace(1.0, self.narrowest, self.tries).tolist():
            for shrink in (width, -width) if format.lopsided else (width,):
                params = format.fit(weight, shrink)
                for _ in range(self.polish):
                    params = format.refit(weight, format.round(weight, params), params, importance)
                error = _error(weight, format, params, importance)
                better = error < least
                least = torch.where(better, error, least)
                best = {key: torch.where(better, params[key], best[key]) for key in best}
        return format.round(weight, best), best


def _error(weight: Tensor, format: Format, params: Params, importance: Tensor | None) -> Tensor:
    """Squared error of each scale's weights, in the shape of the parameters."""
    squared = (format.decode(format.round(weight, params), params) - weight).square_()
    return format.sum_per_scale(squared if importance is None else squared * importance)
