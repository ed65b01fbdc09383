"""MXFP6: E2M3 or E3M2 elements, 32 to a power-of-two scale (OCP Microscaling v1.0)."""

from dataclasses import dataclass

from torch import Tensor

from poise.core.errors import UsageError
from poise.formats._microscaling import Microscaled
from poise.formats._minifloat import minifloat

VARIANTS = {"e2m3": (2, 3), "e3m2": (3, 2)}


@dataclass(frozen=True, kw_only=True)
class Mxfp6(Microscaled):
    """w = 2^(e - 127) * v; 6.25 bits a weight.

    Attributes:
        variant: ``e2m3`` or ``e3m2``.
    """

    bits = 6

    variant: str = "e2m3"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UsageError(f"variant is one of {', '.join(VARIANTS)}, got {self.variant!r}")

    def values(self) -> Tensor:
        return minifloat(*VARIANTS[self.variant])
