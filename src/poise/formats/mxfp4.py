"""MXFP4: E2M1 elements, 32 to a power-of-two scale (OCP Microscaling v1.0). llama.cpp has a block for it."""

from dataclasses import dataclass

from torch import Tensor

from poise.formats._microscaling import Microscaled
from poise.formats._minifloat import minifloat


@dataclass(frozen=True, kw_only=True)
class Mxfp4(Microscaled):
    """w = 2^(e - 127) * v with v of E2M1; 4.25 bits a weight."""

    bits = 4

    def values(self) -> Tensor:
        return minifloat(2, 1)
