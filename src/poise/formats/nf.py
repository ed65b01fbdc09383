"""NormalFloat: quantiles of the normal distribution (Dettmers et al. 2023, QLoRA, equation 4 and appendix E)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.formats._grid import Grid
from poise.formats._groups import Group


@dataclass(frozen=True, kw_only=True)
class Nf(Grid):
    """w = scale * v, v a quantile; 0 and both ends, -1 and 1, are exact. ``nf4`` is ``nf(bits=4)``.

    Half of the levels are quantiles of the positive side, one fewer of the negative, from 1/2 to
    1 - (1 / 2^(b+1) + 1 / (2^(b+1) - 2)) / 2, divided by the largest: for 4 bits the published table.
    """

    bits: int = 4
    group: Group = 64
    scale: str = "auto"

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise UsageError(f"nf takes 2 to 8 bits, got {self.bits!r}")
        self.check()

    def values(self) -> Tensor:
        half = 1 << self.bits - 1
        offset = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
        positive, negative = (
            torch.special.ndtri(torch.linspace(offset, 0.5, count, dtype=torch.float64)[:-1])
            for count in (half + 1, half)
        )
        levels = torch.cat((-negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)))
        scaled: Tensor = levels / positive[0]
        return scaled.float()
