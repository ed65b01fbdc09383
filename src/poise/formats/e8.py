"""E8P, the 16-bit code of eight weights of QuIP# (Tseng et al. 2024, section 4.2).

The lattice E8 moved by 1/4 holds the vectors of half-integers (1/2, 3/2, ...) with an even sum, moved by +1/4 or by
-1/4 in all coordinates. Their magnitudes have 256 patterns: the 227 of squared norm 10 or less, and 29 of norm 12. The
signs of seven coordinates are free, the eighth makes the sum even:

    w = scale * (sign * pattern + shift)      code = pattern | seven signs << 8 | (shift < 0) << 15

Deviations from the paper: the 29 patterns are those that come first in lexicographic order of the 56 that have five
coordinates of 3/2, and the bits of a code have another order. Other choices of the 29 change the error
of Gaussian weights by less than half a percent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.core.format import Format, Params
from poise.formats._block import relative_importance
from poise.formats._e8_search import nearest_e8, sums_e8
from poise.formats._groups import Group, Groups
from poise.formats._lattice import EVEN, sign_table
from poise.formats._lattice_search import Floats, Points
from poise.formats._scales import DTYPES, Scales

RATIOS = torch.tensor([0.8, 0.92, 1.06, 1.25, 1.6])
"""Scales tried for a group, relative to its root mean square; the best is near 1 for Gaussian weights."""
POLISH = 2
"""Rounds of (nearest points, best scale) after the best try."""


@dataclass(frozen=True, kw_only=True)
class E8(Format):
    """Codes are int32 [rows, columns / 8], below 2^16. Params: ``scale`` [rows, groups] in the dtype of ``scale``.

    Attributes:
        group: columns that share a scale, a multiple of 8 that divides the row; or ``"channel"``, a row.
        scale: dtype of the scales; ``"auto"`` lets the container choose.
    """

    bits = 2
    width = 8

    group: Group = "channel"
    scale: str = "auto"

    def __post_init__(self) -> None:
        if self.group != "channel" and not (isinstance(self.group, int) and self.group % self.width == 0):
            raise UsageError(f'e8 takes a group that is a multiple of 8, or "channel", got {self.group!r}')
        Groups(self.group)
        if self.scale not in (*DTYPES, "auto"):
            raise UsageError(f"scale is auto, {', '.join(DTYPES)}, got {self.scale!r}")

    @property
    def groups(self) -> Groups:
        return Groups(self.group)

    @property
    def scales(self) -> Scales:
        return Scales("float32" if self.scale == "auto" else self.scale)

    @property
    def block(self) -> int:
        return self.width if self.group == "channel" else int(self.group)

    def resolve(self, scale_dtype: str) -> "E8":
        return replace(self, scale=scale_dtype) if self.scale == "auto" else self

    @property
    def linear(self) -> tuple[str, ...]:
        return ("scale",) if self.scales.kind in DTYPES else ()

    def group_of(self, columns: int) -> int:
        return self.groups.of(columns)

    def cover(self, weight: Tensor) -> Params:
        return self.fit(weight)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        rows, columns = weight.shape
        n = self.groups.of(columns)
        given = relative_importance(importance, columns, n).numpy()
        if not weight.numel():
            return self.scales.store(torch.zeros(rows, columns // n))
        x = weight.contiguous()
        w = torch.from_numpy(given).view(-1, n)
        square = x.view(rows, -1, n).double().square_().mul_(w).sum(-1)
        mean = (square / w.sum(-1)).sqrt().float()
        tried = mean.unsqueeze(-1) * RATIOS
        found = _refined(x, given, tried)
        best = found.gain.argmax(-1, keepdim=True)
        scale = found.scale.gather(-1, best)
        for _ in range(POLISH):
            scale = _refined(x, given, scale).scale
        return self.scales.store(scale.squeeze(-1))

    def at(self, params: Params, columns: slice) -> Params:
        parts = self.scales.whole_steps(params)
        return {key: self.groups.at(value, columns) for key, value in parts.items()}

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        self.refuse_noise(noise)
        scale = self.scales.load(params).contiguous().numpy()
        given = relative_importance(importance, weight.shape[1], self.width).numpy()
        return torch.from_numpy(nearest_e8(weight.contiguous().numpy(), given, scale, *_table()))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        patterns = _patterns()
        pattern, signs = codes & 255, codes >> 8 & 127
        values = patterns.values[pattern]
        # The eighth sign is what makes the sum even: where the pattern's own sum is odd, the wrong one of an even sign.
        minus = sign_table(self.width, EVEN)[signs]
        minus[..., -1] *= patterns.parity[pattern]
        values *= minus
        values += 0.25 - 0.5 * (codes >> 15).unsqueeze(-1)
        values = values.view(codes.shape[0], codes.shape[1] * self.width)
        return values.mul_(self.groups.spread(self.scales.load(params), values.shape[1]))

    def bits_per_weight(self, rows: int, columns: int) -> float:
        lines, groups = self.groups.stored(rows, columns)
        return (2 * rows * columns + lines * self.scales.bits(groups)) / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``packed`` int16 [rows, columns / 8], the codes' 16 bits, and the scales."""
        return {"packed": (codes - (codes >> 15 << 16)).to(torch.int16), **params}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        kept = {key: value for key, value in stored.items() if key != "packed"}
        return stored["packed"].int() & 65535, kept


def _table() -> tuple[tuple[Points, Points], int]:
    return _patterns().halves, _patterns().even


class _Refined(NamedTuple):
    """Least-squares scales of the points that are nearest at the scales tried, and what these points explain."""

    scale: Tensor
    gain: Tensor


def _refined(x: Tensor, importance: Floats, tried: Tensor) -> _Refined:
    """tried is [rows, groups, k]."""
    a, b = map(torch.from_numpy, sums_e8(x.numpy(), importance, tried.contiguous().numpy(), *_table()))
    product = tried.double() * a
    return _Refined((product / b).float(), product * product.abs() / b)


class _Patterns(NamedTuple):
    """The 256 magnitudes, those with an even sum first.

    Attributes:
        values: [256, 8].
        parity: 1 for an even sum, -1 for an odd one, [256].
        halves: of even sum and of odd, each [8, patterns], doubled.
        even: patterns of even sum.
    """

    values: Tensor
    parity: Tensor
    halves: tuple[Points, Points]
    even: int


@cache
def _patterns() -> _Patterns:
    every = torch.tensor(list(product((0.5, 1.5, 2.5), repeat=8)))
    norm = every.square().sum(1)
    fives = (norm == 12) & (every.amax(1) == 1.5)
    fives &= fives.cumsum(0) <= 29
    values = every[(norm <= 10) | fives]
    odd = values.sum(1) % 2
    values = torch.cat((values[odd == 0], values[odd == 1]))
    even = int((odd == 0).sum())
    return _Patterns(
        values, 1 - 2 * (values.sum(1) % 2), (_padded(values[:even]), _padded(values[even:])), even
    )


def _padded(patterns: Tensor) -> Points:
    """Doubled patterns as columns, the last repeated until vectors of any length are full; of equals the first is found."""
    last = patterns[-1:].expand(-len(patterns) % 32, -1)
    found: Points = (2 * torch.cat((patterns, last))).to(torch.int8).T.contiguous().numpy()
    return found
