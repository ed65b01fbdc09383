"""Stock blocks of llama.cpp with one float16 scale: w = d * level; or scale and minimum: w = d * q + m."""

from abc import abstractmethod
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import Block, from_halves, from_nibbles, halves, nibbles, spread, to_half
from poise.formats._search import Floats, Levels, best_ranges, best_scales, make_levels, nearest_codes

POLISH = 2
"""Rounds of (nearest codes, best scale) after the best try; more changes the error by less than a thousandth."""


LARGEST = 1e15
"""Far more than any block holds; sums of squares are still finite."""


class ScaledBlock(Block):
    """Codes uint8 [rows, columns], numbers of levels from the lowest; params ``scale`` float16 [rows, blocks].

    Attributes:
        levels: ascending values of the codes.
        tries: (narrowest scale tried as a share of the one that covers the block, number of tries).
    """

    levels: ClassVar[tuple[int, ...]]
    tries: ClassVar[tuple[float, int]]

    @property
    def grid(self) -> Levels:
        return make_grid(self.levels)

    def cover(self, weight: Tensor) -> Params:
        grouped = weight.view(weight.shape[0], -1, self.columns)
        low, high = grouped.amin(-1), grouped.amax(-1)
        first, last = self.levels[0], self.levels[-1]
        if first == -last:
            return {"scale": to_half(torch.maximum(high, -low) / last)}
        return {"scale": to_half(torch.where(high >= -low, high, low) / (last if last > -first else first))}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        if not weight.numel():
            return {"scale": torch.zeros(len(weight), weight.shape[1] // self.columns, dtype=torch.float16)}
        mirror = self.levels[0] != -self.levels[-1]
        arrays = weights_of(weight, importance)
        scales, _ = best_scales(*arrays, self.columns, self.grid, self._ratios(mirror), mirror, POLISH)
        return {"scale": to_half(torch.from_numpy(scales))}

    def _ratios(self, mirror: bool) -> Floats:
        """From the largest weight on the last level but one down to where the block is best clipped."""
        narrowest, count = self.tries
        widest = max(1.0, self.levels[-1] / self.levels[-2] if self.levels[-2] > 0 else 1.0)
        return np.append(np.linspace(widest, narrowest, count), 1.0).astype(np.float32)

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        scale = params["scale"].float()
        if noise is not None:
            return by_chance(self.grid.values, weight, spread(scale, weight.shape[1]), noise)
        n = weight.shape[1] // max(1, scale.shape[1])
        codes = np.arange(len(self.levels), dtype=np.uint8)
        arrays = (weight.contiguous().numpy(), scale.contiguous().numpy())
        return torch.from_numpy(nearest_codes(*arrays, max(1, n), self.grid, codes))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        values = torch.from_numpy(self.grid.values)[codes.int()]
        return values.mul_(spread(params["scale"].float(), codes.shape[1]))


class NibbleBlock(ScaledBlock):
    """d, then 4-bit codes in pairs: ``_block.nibbles``."""

    columns = 32
    nbytes = 18
    group = 32
    per = {"scale": 32}  # noqa: RUF012
    bits = 4

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, self.columns)
        return torch.cat((halves(params["scale"]), nibbles(blocks)), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        return from_nibbles(blocks[..., 2:]).flatten(1), {"scale": from_halves(blocks[..., :2])}


class RangeBlock(Block):
    """w = d * q + m. Codes uint8; params ``scale`` and ``minimum`` float16 [rows, blocks]."""

    columns = 32
    group = 32
    per = {"scale": 32, "minimum": 32}  # noqa: RUF012

    @property
    @abstractmethod
    def top(self) -> int:
        """The largest code."""

    def cover(self, weight: Tensor) -> Params:
        grouped = weight.view(weight.shape[0], -1, self.columns)
        low, high = grouped.amin(-1), grouped.amax(-1)
        return {"scale": to_half((high - low) / self.top), "minimum": to_half(low)}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        if not weight.numel():
            empty = torch.zeros(len(weight), weight.shape[1] // self.columns, dtype=torch.float16)
            return {"scale": empty, "minimum": empty.clone()}
        found = best_ranges(*weights_of(weight, importance), self.columns, np.float32(self.top))
        scale, minimum = (to_half(torch.from_numpy(part)) for part in found)
        return {"scale": scale, "minimum": minimum}

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        scale, minimum = (spread(params[key].float(), weight.shape[1]) for key in ("scale", "minimum"))
        steps = (weight - minimum).div_(torch.where(scale == 0, torch.inf, scale))
        steps = steps.round_() if noise is None else steps.add_(noise).floor_()
        return steps.clamp_(0, self.top).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        scale, minimum = (spread(params[key].float(), codes.shape[1]) for key in ("scale", "minimum"))
        return codes.float().mul_(scale).add_(minimum)


def by_chance(levels: Floats, weight: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Numbers of the levels below or above weight / scale, the nearer one the likelier."""
    values = torch.from_numpy(levels)
    t = weight / torch.where(scale == 0, torch.inf, scale)
    lower = (torch.searchsorted(values, t.contiguous(), right=True) - 1).clamp(0, len(values) - 2)
    share = (t - values[lower]) / (values[lower + 1] - values[lower])
    return (lower + (noise < share)).to(torch.uint8)


def weights_of(weight: Tensor, importance: Tensor | None) -> tuple[Floats, Floats]:
    """Weight and importance [1, columns] as the compiled loops take them.

    Raises:
        FormatError: weights whose squares would leave float32; no block's scale could hold them either.
    """
    if float(weight.abs().max()) > LARGEST:
        to_half(weight.abs().max())
    given = torch.ones(weight.shape[1]) if importance is None else importance.float()
    return weight.contiguous().numpy(), given.view(1, -1).contiguous().numpy()


@cache
def make_grid(levels: tuple[int, ...]) -> Levels:
    """Levels with boundaries halfway between."""
    values = np.array(levels, dtype=np.float32)
    return make_levels(values, (values[1:] + values[:-1]) / 2)


def high_bits(codes: Tensor) -> Tensor:
    """The fifth bits of 32 codes, [..., 32], as four bytes: code j is bit j of a little-endian number."""
    bits = (codes >> 4 & 1).view(*codes.shape[:-1], 4, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def from_high_bits(raw: Tensor) -> Tensor:
    """Inverse of ``high_bits``: 0 or 16 for each of 32 codes."""
    return (raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2) << 4
