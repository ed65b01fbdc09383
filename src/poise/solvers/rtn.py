"""Round to nearest on the full range of each group: the baseline, and the fastest."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise.core.format import Format, Params, QTensor
from poise.core.solver import Solver


@dataclass(frozen=True, kw_only=True)
class Rtn(Solver):
    """The range of each group is covered, every weight goes to the nearest level. Needs no data.

    Formats without a range to cover (lattices, learned codebooks) are fitted with equal importance.
    """

    def solve_slab(
        self, weight: Tensor, format: Format, shared: Any, start: QTensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Params]:
        params = format.cover(weight)
        return format.round(weight, params, noise=noise), params
