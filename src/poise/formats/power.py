"""Power-law companding (Yvinec et al. 2023, PowerQuant, arXiv 2301.09858).

Weights are quantized uniformly after sign(w) |w|^a, so that levels are dense near zero where most weights are. The
exponent is searched; a = 1 is the uniform grid.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.core.format import Params
from poise.formats._grid import Grid, Table, round_to, table_of
from poise.formats._groups import Group
from poise.formats._search import best_scales, narrower

STEP = 1 / 32
"""Of 1 / a, the exponent of decoding, which is 1 + STEP * e for a stored byte e."""
TRIED = tuple(range(0, 73, 12))
"""Exponents that are measured; the best lies on a parabola through the best of them and its neighbours."""
SAMPLE = 512
"""Columns that an exponent is chosen on, rounded up to whole groups."""
SAMPLE_ROWS = 256
"""Rows that a tensor's exponent is chosen on."""


@dataclass(frozen=True, kw_only=True)
class Power(Grid):
    """w = scale * sign(q) * (|q| / Q)^(1 / a), q = -Q..Q with Q = 2^(bits-1) - 1; codes are q + Q.

    Params: ``scale`` [rows, groups], ``exponent`` uint8 [rows, 1] ([1, 1] for a tensor's): e with 1 / a = 1 + e / 32.

    Deviations: a weight goes to the nearest level in its value, not in the companded one, and the exponent minimizes
    the squared error of the weights that this leaves; both are what the paper minimizes at the end.

    Attributes:
        exponent: ``"channel"``, one a row, or ``"tensor"``, the paper's.
    """

    bits: int = 4
    group: Group = 64
    exponent: str = "channel"
    scale: str = "auto"

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise UsageError(f"power takes 2 to 8 bits, got {self.bits!r}")
        if self.exponent not in ("channel", "tensor"):
            raise UsageError(f'exponent is "channel" or "tensor", got {self.exponent!r}')
        if self.exponent == "channel" and self.groups.rows != 1:
            raise UsageError(f'groups of {self.group!r} span rows: they need exponent="tensor"')
        self.check()

    @property
    def tile_rows(self) -> int:
        return 0 if self.exponent == "tensor" else self.groups.rows

    @property
    def shared(self) -> frozenset[str]:
        return super().shared | ({"exponent"} if self.exponent == "tensor" else set())

    def values(self) -> Tensor:
        return _values(self.bits, 32)

    def cover(self, weight: Tensor) -> Params:
        return {**super().cover(weight), "exponent": self._exponents(weight, None)}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        exponents = self._exponents(weight, importance)
        if not weight.numel():
            return {**super().cover(weight), "exponent": exponents}
        if self.exponent == "tensor":
            found = self.search(weight, importance, _table(self.bits, int(exponents)))
        else:
            found = torch.empty(weight.shape[0], self.groups.count(weight.shape[1]))
            for e in torch.unique(exponents).tolist():
                rows = (exponents == e).view(-1)
                found[rows] = self.search(weight[rows], importance, _table(self.bits, e))
        return {**self.scales.store(found), "exponent": exponents}

    def _exponents(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        """Bytes of the exponents whose levels leave the least error of a sample, [rows, 1] or [1, 1]."""
        rows, columns = weight.shape
        if not weight.numel():
            return torch.zeros(1 if self.exponent == "tensor" else rows, 1, dtype=torch.uint8)
        n = self.groups.of(columns)
        kept = min(columns, -(-SAMPLE // n) * n)
        step = -(-rows // SAMPLE_ROWS) if self.exponent == "tensor" else 1
        sample = weight[::step, :kept].contiguous()
        weights = None if importance is None else importance[:kept]
        energy = torch.stack([self._explained(sample, weights, _table(self.bits, e)) for e in TRIED])
        if self.exponent == "tensor":
            energy = energy.sum(1, keepdim=True)
        best = energy.argmax(0).clamp(1, len(TRIED) - 2)
        left, middle, right = (energy.gather(0, (best + d).unsqueeze(0))[0] for d in (-1, 0, 1))
        curve = left - 2 * middle + right
        vertex = torch.where(curve < 0, (left - right) / (2 * curve), 0.0).clamp(-1, 1)
        exponents = ((best + vertex) * (TRIED[1] - TRIED[0])).round()
        return exponents.clamp(TRIED[0], TRIED[-1]).to(torch.uint8).view(-1, 1)

    def _explained(self, weight: Tensor, importance: Tensor | None, table: Table) -> Tensor:
        """What the levels explain of each row's weighted sum of squares, float64 [rows]; [1] for one group in all."""
        x, w, n = self.groups.view(weight, importance)
        found = best_scales(
            x.numpy(), w.numpy(), n, table.levels, RATIOS * np.float32(narrower(1, n)), False, 1
        )
        share = self.groups.unview(torch.from_numpy(found[1]), *weight.shape)
        low, high = self.groups.extremes(weight)
        return (share.double() * torch.maximum(high, -low).double().square()).sum(-1)

    def at(self, params: Params, columns: slice) -> Params:
        scales = {key: value for key, value in params.items() if key != "exponent"}
        return {**super().at(scales, columns), "exponent": params["exponent"]}

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        scale = self.effective(params)
        for e, rows in _by_exponent(params["exponent"], len(weight)):
            part = None if noise is None else noise[rows]
            lines = scale if self.groups.whole else scale[rows]
            codes[rows] = round_to(_table(self.bits, e), weight[rows], lines, self.groups, part)
        return codes

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        out = torch.empty(codes.shape)
        for e, rows in _by_exponent(params["exponent"], len(codes)):
            out[rows] = _table(self.bits, e).values[codes[rows].int()]
        return out.mul_(self.groups.spread(self.effective(params), codes.shape[1]))

    def bits_per_weight(self, rows: int, columns: int) -> float:
        lines = 1 if self.exponent == "tensor" else rows
        return super().bits_per_weight(rows, columns) + 8 * lines / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        scales = {key: value for key, value in params.items() if key != "exponent"}
        return {**super().pack(codes, scales), "exponent": params["exponent"]}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        codes, scales = super().unpack({key: v for key, v in stored.items() if key != "exponent"}, columns)
        return codes, {**scales, "exponent": stored["exponent"]}


RATIOS = np.array([1.0, 0.85, 0.72], dtype=np.float32)
"""Scales that exponents are told apart by."""


def _by_exponent(exponents: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(e, mask of its rows); one exponent may stand for all."""
    for e in torch.unique(exponents).tolist():
        yield e, (exponents == e).view(-1).expand(rows)


def _values(bits: int, e: int) -> Tensor:
    """Value of every code; the last code is not used."""
    top = (1 << bits - 1) - 1
    q = torch.arange(-top, top + 1, dtype=torch.float64)
    value = q.sign() * (q.abs() / top) ** (1 + STEP * e)
    return torch.cat((value, torch.tensor([torch.nan]))).float()


@cache
def _table(bits: int, e: int) -> Table:
    return table_of(_values(bits, e))
