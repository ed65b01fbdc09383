"""6-bit floating point, E2M3 and E3M2 (OCP Microscaling v1.0, section 5.3.2)."""

from dataclasses import dataclass

from torch import Tensor

from poise.core.errors import UsageError
from poise.formats._grid import Grid
from poise.formats._groups import Group
from poise.formats._minifloat import minifloat

VARIANTS = {"e2m3": (2, 3), "e3m2": (3, 2)}


@dataclass(frozen=True, kw_only=True)
class Fp6(Grid):
    """w = scale * v; codes are bit patterns. No infinity, no NaN.

    Attributes:
        variant: ``e2m3`` (to 7.5) or ``e3m2`` (to 28).
    """

    bits = 6

    variant: str = "e2m3"
    group: Group = "channel"
    scale: str = "auto"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UsageError(f"variant is one of {', '.join(VARIANTS)}, got {self.variant!r}")
        self.check()

    def values(self) -> Tensor:
        return minifloat(*VARIANTS[self.variant])
