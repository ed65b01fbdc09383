"""Scales, zero points and codebooks of least squared error, weighed by what the layer reads.

A wide range clips nothing but has coarse steps; a narrow one clips the extremes and is finer for the
rest. Every format knows how to search its own parameters (``Format.fit``); this solver asks it to, with the
mean squared input of each column as the weight of an error there.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from poise.core.format import Format, Params, QTensor
from poise.core.solver import Solver


@dataclass(frozen=True, kw_only=True)
class Search(Solver):
    """Minimises sum_j importance_j (w_j - w'_j)^2 over the columns j of each group."""

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def solve_slab(
        self, weight: Tensor, format: Format, shared: Any, start: QTensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Params]:
        params = format.fit(weight, shared)
        return format.round(weight, params, shared, noise), params
