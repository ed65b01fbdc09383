"""MXFP8: E4M3 or E5M2 elements, 32 to a power-of-two scale (OCP Microscaling v1.0)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.formats._microscaling import Microscaled

VARIANTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True)
class Mxfp8(Microscaled):
    """w = 2^(e - 127) * v; 8.25 bits a weight.

    Attributes:
        variant: ``e4m3`` or ``e5m2``.
    """

    bits = 8

    variant: str = "e4m3"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UsageError(f"variant is one of {', '.join(VARIANTS)}, got {self.variant!r}")

    def values(self) -> Tensor:
        value = torch.arange(256, dtype=torch.uint8).view(VARIANTS[self.variant]).float()
        return torch.where(value.isinf(), torch.nan, value)
