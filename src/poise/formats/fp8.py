"""8-bit floating point, as OCP 8-bit Floating Point Specification v1.0 and torch's float8 types define it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.formats._grid import Grid
from poise.formats._groups import Group

VARIANTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True)
class Fp8(Grid):
    """w = scale * v, v one of the finite values of the type; codes are its bit patterns.

    Attributes:
        variant: ``e4m3`` (E4M3FN: to 448, no infinity) or ``e5m2`` (to 57344).
    """

    bits = 8

    variant: str = "e4m3"
    group: Group = "channel"
    scale: str = "auto"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UsageError(f"variant is one of {', '.join(VARIANTS)}, got {self.variant!r}")
        self.check()

    def values(self) -> Tensor:
        value = torch.arange(256, dtype=torch.uint8).view(VARIANTS[self.variant]).float()
        return torch.where(value.isinf(), torch.nan, value)
