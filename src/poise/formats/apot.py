"""Additive powers of two (Li, Dong, Wang 2020, "Additive Powers-of-Two Quantization", equation 5)."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.formats._grid import Grid
from poise.formats._groups import Group


@dataclass(frozen=True, kw_only=True)
class Apot(Grid):
    """w = scale * sign * sum_i p_i, each p_i zero or a power of two.

    A magnitude of bits - 1 bits is n terms of two bits each, p_i from {0, 2^-i, 2^-(i+n), 2^-(i+2n)} for i = 0..n-1.
    An odd bit is one more term, {0, 2^-2n}, and the last power of the others is then 2^-(i+2n+1), so that no power
    comes twice. Sums are divided by the largest.
    """

    bits: int = 4
    group: Group = 64
    scale: str = "auto"

    def __post_init__(self) -> None:
        if self.bits not in range(3, 9):
            raise UsageError(f"apot takes 3 to 8 bits, got {self.bits!r}")
        self.check()

    def values(self) -> Tensor:
        n, odd = divmod(self.bits - 1, 2)
        terms = [[0.0, 2.0**-i, 2.0 ** -(i + n), 2.0 ** -(i + 2 * n + odd)] for i in range(n)]
        terms += [[0.0, 2.0 ** -(2 * n)]] * odd
        sums = torch.tensor(sorted(sum(term) for term in product(*terms)), dtype=torch.float64)
        positive = (sums / sums[-1]).float()
        return torch.cat((positive, torch.tensor([torch.nan]), -positive[1:]))
