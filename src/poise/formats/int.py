"""Uniform affine integers, the grid that every engine knows.

Three reconstruction formulas, for code q, scale s and a group's offset:

    symmetric                        w = s * q          q in [-2^(b-1), 2^(b-1) - 1]
    asymmetric, zero="integer"       w = s * (q - z)    q, z in [0, 2^b - 1]
    asymmetric, zero="minimum"       w = s * q + m      q in [0, 2^b - 1], m stored like s

The symmetric scale is signed: the weight of largest magnitude becomes the code -2^(b-1), which is the
one level that has no mirror image. All 2^b levels are used, and a constant group is exact because its
scale is the constant divided by a power of two. (llama.cpp's Q4_0 and AutoRound's "full range" do so.)
``narrow`` leaves that level out, as engines that negate codes want it; the scale is then positive.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from poise.core.bits import pack_bits, unpack_bits, words
from poise.core.errors import UsageError
from poise.core.format import Format, Params
from poise.formats._groups import Group, Groups
from poise.formats._scales import DTYPES, KINDS, POLISH, Scales, divisor
from poise.formats._search import Floats, Levels, best_ranges, best_zeros, make_levels, narrower


@dataclass(frozen=True, kw_only=True)
class Int(Format):
    """Integers of ``bits`` bits with a scale for each group.

    Params: ``scale`` [rows, groups] as ``_scales.Scales`` stores it, and for asymmetric grids ``zero`` uint8 or
    ``minimum`` (dtype of the scale), of the same shape; one row and one group for ``group="tensor"``.

    Attributes:
        bits: 1 to 8.
        group: inputs that share a scale, 16 to 256 (the last group of a row may be shorter), ``"channel"`` (one
            scale an output), ``"128x128"`` (blocks of outputs and inputs) or ``"tensor"``.
        symmetric: whether zero is fixed at code 0.
        zero: what an asymmetric grid stores as its offset.
        narrow: whether the lowest code of a symmetric grid is left out.
        scale: dtype of the scales, ``e8m0`` (powers of two) or ``double`` (8 bits and a second level); ``"auto"``
            lets the container choose.
    """

    bits: int
    group: Group
    symmetric: bool = True
    zero: str = "integer"
    narrow: bool = False
    scale: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise UsageError(f"int takes 1 to 8 bits, got {self.bits!r}")
        Groups(self.group)
        if self.zero not in ("integer", "minimum"):
            raise UsageError(f'zero is "integer" or "minimum", got {self.zero!r}')
        if self.symmetric and self.zero != "integer":
            raise UsageError('zero="minimum" needs symmetric=False: a symmetric grid stores no offset')
        if self.narrow and (not self.symmetric or self.bits == 1):
            raise UsageError("narrow leaves out the lowest code of a symmetric grid of 2 bits or more")
        if self.scale not in (*KINDS, "auto"):
            raise UsageError(f"scale is auto, {', '.join(KINDS)}, got {self.scale!r}")
        if self.zero == "minimum" and self.scale not in (*DTYPES, "auto"):
            raise UsageError(f"a minimum is stored like the scale, and {self.scale} holds no such number")

    def resolve(self, scale_dtype: str) -> "Int":
        return replace(self, scale=scale_dtype) if self.scale == "auto" else self

    @property
    def groups(self) -> Groups:
        return Groups(self.group)

    @property
    def scales(self) -> Scales:
        return Scales("float32" if self.scale == "auto" else self.scale, signed=self.lopsided)

    @property
    def tile_rows(self) -> int:
        return self.groups.rows

    @property
    def shared(self) -> frozenset[str]:
        return frozenset({"scale", "scale_step", "zero", "minimum"} if self.groups.whole else ())

    @property
    def lopsided(self) -> bool:
        """Whether a mirrored range is another grid."""
        return self.symmetric and not self.narrow

    @property
    def lowest(self) -> int:
        return -(1 << self.bits - 1) + self.narrow if self.symmetric else 0

    @property
    def highest(self) -> int:
        return (1 << self.bits - self.symmetric) - 1

    @property
    def alphabet(self) -> Tensor:
        dtype = torch.int8 if self.symmetric else torch.uint8
        return torch.arange(self.lowest, self.highest + 1).to(dtype)

    @property
    def linear(self) -> tuple[str, ...]:
        if self.groups.rows != 1 or self.scales.kind not in DTYPES:
            return ()
        return ("scale", "minimum") if self.zero == "minimum" and not self.symmetric else ("scale",)

    def group_of(self, columns: int) -> int:
        return self.groups.of(columns)

    def cover(self, weight: Tensor) -> Params:
        low, high = self.groups.extremes(weight)
        if self.symmetric:
            return self.scales.store(self.scales.covering(self._cover_symmetric(low, high)))
        if self.zero == "integer":
            # A constant group is one step from zero: exact, where range / (2^b - 1) would be rounded.
            constant = low == high
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = torch.where(constant, high - low, (high - low) / self.highest)
            return self._with_zero(self.scales.covering(scale), low)
        return self._with_minimum((high - low) / self.highest, low)

    def _cover_symmetric(self, low: Tensor, high: Tensor) -> Tensor:
        if self.scales.negative:
            return torch.where(high >= -low, high, low) / self.lowest
        above = high / self.highest if self.highest else torch.zeros_like(high)
        return torch.maximum(above, low / self.lowest)

    def _with_zero(self, scale: Tensor, low: Tensor) -> Params:
        stored = self.scales.store(scale)
        zero = (-low / divisor(self.scales.load(stored))).round().clamp(0, self.highest)
        return {**stored, "zero": zero.to(torch.uint8)}

    def _with_minimum(self, scale: Tensor, minimum: Tensor) -> Params:
        return {**self.scales.store(scale), "minimum": self.scales.store(minimum)["scale"]}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        if not weight.numel():
            return self.cover(weight)
        x, w, n = self.groups.view(weight, importance)
        shape = tuple(weight.shape)
        if self.symmetric:
            grid = _whole_numbers(self.lowest, self.highest)
            found = self.scales.search(x, w, n, grid, self._ratios(n), self._cover_symmetric)
            return self.scales.store(self.groups.unview(found, *shape))
        top = np.float32(self.highest)
        if self.zero == "integer":
            scale, zero = best_zeros(x.numpy(), w.numpy(), n, top, self._ratios(n), POLISH)
            stored = self.scales.store(self.groups.unview(torch.from_numpy(scale), *shape))
            return {**stored, "zero": self.groups.unview(torch.from_numpy(zero), *shape)}
        ranges = best_ranges(x.numpy(), w.numpy(), n, top)
        return self._with_minimum(*(self.groups.unview(torch.from_numpy(part), *shape) for part in ranges))

    def _ratios(self, n: int) -> Floats:
        """From the full range down to where it is best clipped; narrower for few levels and large groups."""
        narrowest, tries = (
            (0.15, 16),
            (0.15, 16),
            (0.3, 14),
            (0.5, 12),
            (0.6, 10),
            (0.8, 6),
            (0.9, 4),
            (0.95, 4),
        )[self.bits - 1]
        return np.linspace(1.0, narrower(narrowest, n), tries, dtype=np.float32)

    def at(self, params: Params, columns: slice) -> Params:
        parts = self.scales.whole_steps(params)
        return {key: self.groups.at(value, columns) for key, value in parts.items()}

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        columns = weight.shape[1]
        scale = self.groups.spread(divisor(self.scales.load(params)), columns)
        if "minimum" in params:
            steps = (weight - self.groups.spread(params["minimum"].float(), columns)).div_(scale)
        else:
            steps = weight / scale
        steps = steps.round_() if noise is None else steps.add_(noise).floor_()
        if "zero" in params:
            steps += self.groups.spread(params["zero"].float(), columns)
        return steps.clamp_(self.lowest, self.highest).to(torch.int8 if self.symmetric else torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        columns = codes.shape[1]
        steps = codes.float()
        if "zero" in params:
            steps = steps - self.groups.spread(params["zero"].float(), columns)
        weight = steps.mul_(self.groups.spread(self.scales.load(params), columns))
        if "minimum" not in params:
            return weight
        return weight.add_(self.groups.spread(params["minimum"].float(), columns))

    def bits_per_weight(self, rows: int, columns: int) -> float:
        lines, groups = self.groups.stored(rows, columns)
        per_line = self.scales.bits(groups)
        total = 32 * rows * words(columns, self.bits) + lines * per_line
        if not self.symmetric:
            total += lines * per_line if self.zero == "minimum" else 32 * groups * words(lines, self.bits)
        return total / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``packed`` int32 [rows, words] of codes minus the lowest possible one; ``zero_packed`` runs down rows."""
        shifted = codes.view(torch.uint8) + (self._offset & 255) if self.symmetric else codes  # wraps
        kept = {key: self.groups.kept(value) for key, value in params.items()}
        stored = {"packed": pack_bits(shifted, self.bits), **kept}
        if "zero" in stored:
            stored["zero_packed"] = pack_bits(stored.pop("zero").T.contiguous(), self.bits)
        return stored

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        params = {key: value for key, value in stored.items() if not key.endswith("packed")}
        if "zero_packed" in stored:
            lines = params["scale"].shape[0]
            params["zero"] = unpack_bits(stored["zero_packed"], self.bits, lines).T.contiguous()
        codes = unpack_bits(stored["packed"], self.bits, columns)
        if self.symmetric:
            codes = codes.sub_(self._offset & 255).view(torch.int8)  # wraps
        return codes, self.groups.unkept(params, codes.shape[0])

    @property
    def _offset(self) -> int:
        return 1 << self.bits - 1


@cache
def _whole_numbers(low: int, high: int) -> Levels:
    levels = np.arange(low, high + 1, dtype=np.float32)
    return make_levels(levels, levels[1:] - np.float32(0.5))
