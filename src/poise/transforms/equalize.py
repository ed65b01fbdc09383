"""Scaling of channels for error feedback."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.core.hessian import factorize
from poise.core.topology import Topology
from poise.core.transform import Material, Rewrite, Transform
from poise.transforms._scales import balanced, scaled_norm, scaled_pair, written_by
from poise.transforms.awq import known

SMALLEST = 1e-4
"""Of the largest column, below which one counts as this."""


@dataclass(frozen=True, kw_only=True)
class Equalize(Transform):
    """Channels whose errors cost most after error feedback are made larger before rounding, those that widen the range of
    their group smaller: s_j = (R_jj / c_j)^(strength / 2), c_j the root mean square of column j over the matrices that read
    it, H = R R^T their damped Hessian in the order in which ``gptq`` rounds columns.

    Feedback loses sum_j R_jj^2 e_j^2, e_j the rounding error of column j: a step divided by s_j. Steps go with the root mean
    square of what a group holds, sum_j c_j^2 s_j^2. The product of sum_j R_jj^2 / s_j^2 and sum_j c_j^2 s_j^2 is least where
    s_j^2 = R_jj / c_j (Cauchy-Schwarz). Nothing is searched. (As AWQ, Lin et al. 2023, arXiv 2306.00978, in what is rewritten;
    the scale is our own. Groups are treated as if they held all columns, and columns as if they had no tails, so that less
    than all of the way is best: docs/lab.md.)

    What cannot be scaled is left alone.

    Attributes:
        strength: how much of the way, 0 to 1.
        damp: added to the diagonal of H, as a share of its mean; that of the solver.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment", "hessian"})
    tokens: ClassVar[int | None] = 4096

    strength: float = 0.75
    damp: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1 or not 0 < self.damp <= 1:
            raise UsageError("strength is between 0 and 1, damp above 0 and at most 1")

    def refuses(self, topology: Topology) -> str | None:
        return None

    def rewrites(self, material: Material) -> Sequence[Rewrite]:
        done: list[Rewrite] = []
        for norm in material.topology.norms:
            readers = known(material, norm.readers)
            if norm.only and readers and (factor := self._factor(material, readers)) is not None:
                done += scaled_norm(norm, balanced(factor), material.read)
        for pair in material.topology.pairs:
            readers = known(material, (pair.reader,))
            if readers and (factor := self._factor(material, readers)) is not None:
                done += scaled_pair(pair, balanced(written_by(pair, factor.log()).exp()))
        return done

    def _factor(self, material: Material, readers: Sequence[str]) -> Tensor | None:
        """s for the columns of matrices that read the same, [columns]; None if they are zero."""
        hessians = {id(h): h for name in readers if (h := material.stats[name].hessian) is not None}
        cost = torch.stack([pivots(hessian, self.damp) for hessian in hessians.values()]).sum(0)
        columns = torch.stack([material.read(name).double().square().sum(0) for name in readers]).sum(0)
        if not bool(columns.any()):
            return None
        columns = columns.clamp(min=SMALLEST**2 * float(columns.max()))
        return (cost / columns.sqrt()) ** (self.strength / 2)


def pivots(hessian: Tensor, damp: float) -> Tensor:
    """R_jj, [columns] float64, for H = R R^T damped, columns in the order of error feedback."""
    factor, found = factorize(hessian, damp=damp), torch.empty(len(hessian), dtype=torch.float64)
    found[factor.order] = factor.upper.diagonal().double()
    return found
