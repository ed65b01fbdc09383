"""Scalar grids: w = scale * level. A format says which levels its codes have; all else is here."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from poise.core.bits import pack_bits, unpack_bits, words
from poise.core.errors import UsageError
from poise.core.format import Format, Params
from poise.formats._chance import by_chance
from poise.formats._groups import Group, Groups
from poise.formats._scales import DTYPES, KINDS, Scales
from poise.formats._search import Codes, Floats, Levels, make_levels, narrower, nearest_codes


class Grid(Format):
    """Params: ``scale`` [rows, groups] as ``_scales.Scales`` stores it. Codes are uint8 [rows, columns].

    A weight goes to the nearest level; halfway between two, to the one with the even code (IEEE 754).

    Attributes:
        group: weights that share a scale: a number, ``"channel"``, ``"128x128"`` or ``"tensor"``.
        scale: how scales are stored; ``"auto"`` lets the container choose.
    """

    group: Group
    scale: str

    @abstractmethod
    def values(self) -> Tensor:
        """Value of every code, float32 [2^bits] in the order of the codes; NaN for codes that are not used."""

    def check(self) -> None:
        """Refuses fields that are no group or no scale, with ``UsageError``."""
        Groups(self.group)
        if self.scale not in (*KINDS, "auto"):
            raise UsageError(f"scale is auto, {', '.join(KINDS)}, got {self.scale!r}")

    @property
    def groups(self) -> Groups:
        return Groups(self.group)

    @property
    def scales(self) -> Scales:
        return Scales("float32" if self.scale == "auto" else self.scale, signed=self.lopsided)

    @property
    def lopsided(self) -> bool:
        """Whether the levels are not symmetric about zero, so that a negative scale makes another grid of them."""
        levels = self.table.levels.values
        return not np.array_equal(levels, -levels[::-1])

    @property
    def table(self) -> "Table":
        return make_table(self)

    @property
    def tile_rows(self) -> int:
        return self.groups.rows

    @property
    def shared(self) -> frozenset[str]:
        return frozenset({"scale", "scale_step"} if self.groups.whole else ())

    @property
    def alphabet(self) -> Tensor:
        return torch.arange(len(self.values()), dtype=torch.uint8)[self.values().isfinite()]

    @property
    def linear(self) -> tuple[str, ...]:
        return ("scale",) if self.groups.rows == 1 and self.scales.kind in DTYPES else ()

    def group_of(self, columns: int) -> int:
        return self.groups.of(columns)

    def cover(self, weight: Tensor) -> Params:
        low, high = self.groups.extremes(weight)
        return self.scales.store(self.scales.covering(self._cover(low, high, self.table)))

    def _cover(self, low: Tensor, high: Tensor, table: "Table") -> Tensor:
        """The extreme weight of each group on the outermost level, where the scale may be negative for that."""
        first, last = float(table.levels.values[0]), float(table.levels.values[-1])
        if self.scales.negative and first != -last:
            far = last if last > -first else first
            return torch.where(high >= -low, high, low) / far
        return torch.maximum(high / last, low / first)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        if not weight.numel():
            return self.cover(weight)
        return self.scales.store(self.search(weight, importance, self.table))

    def search(self, weight: Tensor, importance: Tensor | None, table: "Table") -> Tensor:
        """Scales of least squared error that can be stored, float32 [rows, groups]."""
        x, w, n = self.groups.view(weight, importance)
        cover = partial(self._cover, table=table)
        found = self.scales.search(x, w, n, table.levels, table.ratios(n), cover)
        return self.groups.unview(found, *weight.shape)

    def at(self, params: Params, columns: slice) -> Params:
        parts = self.scales.whole_steps(params)
        return {key: self.groups.at(value, columns) for key, value in parts.items()}

    def effective(self, params: Params) -> Tensor:
        """The factor of the levels, float32 [rows, groups]."""
        return self.scales.load(params)

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        return round_to(self.table, weight, self.effective(params), self.groups, noise)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        levels = self.table.values[codes.int()]
        return levels.mul_(self.groups.spread(self.effective(params), codes.shape[1]))

    def bits_per_weight(self, rows: int, columns: int) -> float:
        lines, groups = self.groups.stored(rows, columns)
        total = 32 * rows * words(columns, int(self.bits)) + lines * self.scales.bits(groups)
        return total / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``packed`` int32 [rows, words] of the codes, and each group's parameters once."""
        kept = {key: self.groups.kept(value) for key, value in params.items()}
        return {"packed": pack_bits(codes, int(self.bits)), **kept}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        codes = unpack_bits(stored["packed"], int(self.bits), columns)
        kept = {key: value for key, value in stored.items() if key != "packed"}
        return codes, self.groups.unkept(kept, codes.shape[0])

    def resolve(self, scale_dtype: str) -> "Format":
        return replace(self, scale=scale_dtype) if self.scale == "auto" else self  # type: ignore[type-var]


class Table(NamedTuple):
    """The levels of a grid, in the forms that rounding takes.

    Attributes:
        values: of every code, float32.
        levels: without duplicates.
        codes: of the levels, uint8.
    """

    values: Tensor
    levels: Levels
    codes: Codes

    def ratios(self, n: int) -> Floats:
        """Scales worth trying for groups of n, as multiples of the one that covers the group.

        From just covering it down to where Gaussian weights are best clipped, and a little below. A group whose largest
        weight is not on the outermost level is found by the ratios above 1, so that decoded weights are encoded to
        themselves.
        """
        levels = self.levels.values
        _, narrowest, tries, inner = next(choice for choice in TRIES if len(levels) <= choice[0])
        if levels[0] != -levels[-1]:  # then each is tried with both signs
            tries = tries * 3 // 4
        ends = [levels[-1] / level for level in levels[-1 - inner : -1] if level > 0]
        ends += [levels[0] / level for level in levels[1 : 1 + inner] if level < 0]
        above = sorted({float(ratio) for ratio in ends if ratio < 2.5})
        widest = min(1.6, max([1.0, *above[:1]]))  # the largest weight may do better one level further in
        lowest = narrower(narrowest, n)
        tries += round(tries * math.log(narrowest / lowest))
        return np.array([*above, 1.0, *np.geomspace(widest, lowest, tries)], dtype=np.float32)


@cache
def make_table(grid: Grid) -> Table:
    """The table of a grid's values."""
    return table_of(grid.values())


def table_of(values: Tensor) -> Table:
    """The table of values, [codes]."""
    codes = np.arange(len(values))
    value = values.numpy().astype(np.float32) + np.float32(0)  # no negative zero
    usable = codes[~np.isnan(value)]
    levels, first = np.unique(value[usable], return_index=True)
    chosen = usable[first]
    middle = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    bounds = middle.astype(np.float32)
    below = bounds > middle  # never above the true middle
    bounds[below] = np.nextafter(bounds[below], np.float32(-np.inf))
    tied = (bounds == middle) & (chosen[1:] % 2 == 0)  # the middle itself goes up, to the even code
    bounds[tied] = np.nextafter(bounds[tied], np.float32(-np.inf))
    return Table(
        torch.nan_to_num(values.float(), nan=0.0),
        make_levels(levels, bounds),
        chosen.astype(np.uint8),
    )


TRIES = ((4, 0.15, 14, 1), (8, 0.3, 12, 1), (17, 0.55, 11, 1), (256, 0.7, 4, 3))
"""(levels at most, narrowest ratio, number of ratios, levels beside the outermost); twice as many ratios change the
error of Gaussian weights by less than half a percent."""


def round_to(table: Table, weight: Tensor, scale: Tensor, groups: Groups, noise: Tensor | None) -> Tensor:
    """Codes of the nearest levels, or by chance one of the two around each weight; uint8 [rows, columns]."""
    if noise is not None:
        numbers = by_chance(table.levels.values, weight, groups.spread(scale, weight.shape[1]), noise)
        return torch.from_numpy(table.codes)[numbers.int()]
    if not weight.numel():
        return torch.empty(weight.shape, dtype=torch.uint8)
    n = groups.of(weight.shape[1]) if scale.shape[1] > 1 else weight.shape[1]
    arrays = (weight.contiguous().numpy(), scale.contiguous().numpy())
    return torch.from_numpy(nearest_codes(*arrays, n, table.levels, table.codes))
