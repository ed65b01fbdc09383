"""Logarithmic: a sign and a power of two, so that a product is a shift (Miyashita et al. 2016)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.formats._grid import Grid
from poise.formats._groups import Group


@dataclass(frozen=True, kw_only=True)
class Log2(Grid):
    """w = scale * sign * 2^(1 - m) for m = 1..2^(bits-1) - 1, and zero for m = 0.

    The code is sign and m; the code of minus zero is not used. Deviation: nearest in the value, not in the
    logarithm, which has the smaller squared error.
    """

    bits: int = 4
    group: Group = 64
    scale: str = "auto"

    def __post_init__(self) -> None:
        if self.bits not in range(2, 6):
            raise UsageError(f"log2 takes 2 to 5 bits, got {self.bits!r}")
        self.check()

    def values(self) -> Tensor:
        m = torch.arange(1, 1 << self.bits - 1)
        positive = torch.cat((torch.zeros(1), torch.ldexp(torch.ones(m.shape), 1 - m)))
        return torch.cat((positive, torch.tensor([torch.nan]), -positive[1:]))
