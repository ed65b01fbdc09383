"""Error feedback that also makes up for the layers before: their quantized outputs are this layer's inputs."""

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
    """Minimises E |W x' - W' x|^2, x the inputs from the quantized prefix and x' those of the original model.

    The unrounded optimum is W C H^-1 with H = E[x x^T] and C = E[x' x^T]; error feedback under H follows, from a target
    that goes ``share`` of the way there: W (I + share (C - H) H^-1). (Li et al. 2025, GPTAQ, arXiv 2504.02692, make the
    same correction within the sweep; QEP, Arai and Ichikawa 2025, arXiv 2504.09629, has the share.)

    Attributes:
        share: of the correction. All of it fits the calibration text too well: what the prefix has lost is partly noise.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment", "hessian", "cross"})

    share: float = 0.5

    def target(self, weight: Tensor, format: Format, stats: Stats | None) -> Tensor:
        if stats is None or stats.hessian is None or stats.cross is None:
            return weight
        factor = self.factor(format, stats)
        drift = stats.cross - stats.hessian
        moved = torch.empty(weight.shape)
        for start in range(0, len(weight), ROWS):
            slab = weight[start : start + ROWS].float()
            drifted = (slab @ drift)[:, factor.order]
            lower = torch.linalg.solve_triangular(factor.upper.T, drifted, upper=False, left=False)
            change = over(lower, factor.upper)  # H^-1 = R^-T R^-1
            moved[start : start + ROWS] = slab
            moved[start : start + ROWS, factor.order] += self.share * change
        return moved
