"""MXINT8: 8-bit integers with six fractional bits, 32 to a power-of-two scale (OCP Microscaling v1.0)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.formats._microscaling import Microscaled


@dataclass(frozen=True, kw_only=True)
class Mxint8(Microscaled):
    """w = 2^(e - 127) * k / 64, k in two's complement; 8.25 bits a weight.

    -128 / 64 is left out, as the specification allows (5.3.4), so that the grid is symmetric.
    """

    bits = 8

    def values(self) -> Tensor:
        value = torch.arange(256, dtype=torch.uint8).view(torch.int8).float() / 64
        return torch.where(value == -2, torch.nan, value)
