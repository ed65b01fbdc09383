"""Error feedback that also makes up for the layers before: for what their losses change of a layer's inputs, and of what
its output is added to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from poise.core.format import Format
from poise.core.stats import Stats
from poise.solvers.gptq import Gptq, over

ROWS = 1024
"""Rows of a weight that are corrected at a time."""


@dataclass(frozen=True, kw_only=True)
class Gptaq(Gptq):
    """Minimises E |(r' + W x') - (r + W' x)|^2, x the inputs from the quantized prefix, r what the residual stream holds
    before the output is added to it, x' and r' those of the original model.

    The unrounded optimum is W + (W (C - H) + D) H^-1 with H = E[x x^T], C = E[x' x^T] and D = E[(r' - r) x^T]; error
    feedback under H follows, from a target that goes ``share`` of the way there. Layers whose output is not added to the
    stream as it is have no r: what is left is E |W x' - W' x|^2. (Li et al. 2025, GPTAQ, arXiv 2504.02692, make that
    correction within the sweep; QEP, Arai and Ichikawa 2025, arXiv 2504.09629, has the share; neither has D.)

    Attributes:
        share: of the correction. All of it fits the calibration text too well: what the prefix has lost is partly noise.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment", "hessian", "cross", "drift"})

    share: float = 0.7

    def target(self, weight: Tensor, format: Format, stats: Stats | None) -> Tensor:
        if stats is None or stats.hessian is None or stats.cross is None:
            return weight
        factor = self.factor(format, stats)
        drift = stats.cross - stats.hessian
        moved = torch.empty(weight.shape)
        for start in range(0, len(weight), ROWS):
            slab = weight[start : start + ROWS].float()
            lacking = slab @ drift
            if stats.drift is not None:
                lacking += stats.drift[start : start + ROWS]
            lower = torch.linalg.solve_triangular(
                factor.upper.T, lacking[:, factor.order], upper=False, left=False
            )
            moved[start : start + ROWS] = slab
            change = over(lower, factor.upper)  # H^-1 = R^-T R^-1
            moved[start : start + ROWS, factor.order] += self.share * change
        return moved
