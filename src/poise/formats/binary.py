"""Signs times a scale (Rastegari et al. 2016, XNOR-Net, equation 6: BWN)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._grid import Grid
from poise.formats._groups import Group


@dataclass(frozen=True, kw_only=True)
class Binary(Grid):
    """w = scale * (2 q - 1), q = 0, 1; the scale is the mean of |w| in its group, weighed by importance.

    That is the optimum in closed form; on Gaussian weights the error is 1 - 2 / pi. Zero counts as negative. Groups of
    128 with float16 scales are llama.cpp's Q1_0.
    """

    bits = 1

    group: Group = 128
    scale: str = "float16"

    def __post_init__(self) -> None:
        self.check()

    def values(self) -> Tensor:
        return torch.tensor([-1.0, 1.0])

    def cover(self, weight: Tensor) -> Params:
        return self.fit(weight)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        if not weight.numel():
            return super().cover(weight)
        x, w, n = self.groups.view(weight.abs(), importance)
        counted = self.groups.view(weight, None)[1]  # zero beyond the edges of the matrix
        scale, flat = _mean(x, w, n), _mean(x, counted, n)
        found = self.groups.unview(torch.where(scale.isnan(), flat, scale), *weight.shape)
        if self.scales.kind == "e8m0":  # the error is quadratic in the scale: the nearest is the best
            near = self.scales.around(found)
            best = (near - found.unsqueeze(-1)).abs().argmin(-1, keepdim=True)
            found = near.gather(-1, best).squeeze(-1)
        return self.scales.store(found)


def _mean(x: Tensor, w: Tensor, n: int) -> Tensor:
    """Weighted means of runs of n columns, [rows, runs], NaN without weight; the last run may be shorter."""
    missing = (0, -x.shape[1] % n)
    total, mass = (
        torch.nn.functional.pad(part, missing).view(part.shape[0], -1, n).sum(-1)
        for part in (x.double() * w, w.double())  # float32 would overflow
    )
    return (total / mass).float()
