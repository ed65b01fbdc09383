"""Ternary: minus one, zero, one times a scale (Ma et al. 2024, BitNet b1.58; Li et al. 2016, TWN)."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor
from torch.nn.functional import pad

from poise.core.format import Params
from poise.formats._grid import Grid
from poise.formats._groups import Group

TRITS = 5
"""Codes of three values in a byte: 3^5 = 243."""
PLACES = torch.tensor([3**k for k in range(TRITS)], dtype=torch.int16)


@dataclass(frozen=True, kw_only=True)
class Ternary(Grid):
    """w = scale * (q - 1), q = 0, 1, 2; five to a byte, 1.6 bits a weight.

    ``cover`` is absmean: the scale is mean |w| (BitNet b1.58, equations 1 to 3). ``fit`` finds the scale of least
    squared error.
    """

    bits = log2(3)

    group: Group = "channel"
    scale: str = "auto"

    def __post_init__(self) -> None:
        self.check()

    def values(self) -> Tensor:
        return torch.tensor([-1.0, 0.0, 1.0])

    def cover(self, weight: Tensor) -> Params:
        if not weight.numel():
            return super().cover(weight)
        x, counted, n = self.groups.view(weight.abs(), None)
        totals, counts = (_run_sums(part, n) for part in (x, counted))
        return self.scales.store(
            self.scales.covering(self.groups.unview(totals / counts.clamp(min=1), *weight.shape))
        )

    def bits_per_weight(self, rows: int, columns: int) -> float:
        lines, groups = self.groups.stored(rows, columns)
        return (8 * rows * -(-columns // TRITS) + lines * self.scales.bits(groups)) / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``packed`` uint8 [rows, columns / 5], base 3, the first weight in the lowest place."""
        count = -(-codes.shape[1] // TRITS)
        fives = pad(codes, (0, count * TRITS - codes.shape[1])).view(len(codes), count, TRITS)
        packed = (fives * PLACES).sum(-1).to(torch.uint8)
        return {"packed": packed, **{key: self.groups.kept(value) for key, value in params.items()}}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        packed = stored["packed"].unsqueeze(-1)
        codes = (packed // PLACES % 3).to(torch.uint8).flatten(1)[:, :columns].contiguous()
        kept = {key: value for key, value in stored.items() if key != "packed"}
        return codes, self.groups.unkept(kept, codes.shape[0])


def _run_sums(values: Tensor, n: int) -> Tensor:
    """Sums of runs of n columns, [rows, runs]; the last may be shorter."""
    runs = -(-values.shape[1] // n)
    return pad(values, (0, runs * n - values.shape[1])).view(values.shape[0], runs, n).sum(-1)
