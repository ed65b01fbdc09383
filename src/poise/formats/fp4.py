"""4-bit floating point, E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (OCP Microscaling v1.0, 5.3.3)."""

from dataclasses import dataclass

from torch import Tensor

from poise.formats._grid import Grid
from poise.formats._groups import Group
from poise.formats._minifloat import minifloat


@dataclass(frozen=True, kw_only=True)
class Fp4(Grid):
    """w = scale * v; codes are bit patterns, the sign in the highest of four bits."""

    bits = 4

    group: Group = 32
    scale: str = "auto"

    def __post_init__(self) -> None:
        self.check()

    def values(self) -> Tensor:
        return minifloat(2, 1)
