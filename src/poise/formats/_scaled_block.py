"""Stock blocks of llama.cpp with one float16 scale: w = d * level; or scale and minimum: w = d * q + m."""

from abc import abstractmethod
from functools import cache
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import (
    Block,
    from_halves,
    from_nibbles,
    halves,
    nibbles,
    relative_importance,
    spread,
    to_half,
)
from poise.formats._chance import by_chance
from poise.formats._search import (
    Floats,
    Levels,
    best_ranges,
    best_scales,
    extremes,
    make_levels,
    nearest_codes,
    nearest_steps,
)

POLISH = 2
"""Rounds of (nearest codes, best scale) after the best try; more changes the error by less than a thousandth."""


LARGEST = 1e15
"""Far more than any block holds; sums of squares are still finite."""
FULL, STEP = 2.0**-14, 2.0**-24
"""Below FULL float16 is a multiple of STEP."""


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

    @property
    def alphabet(self) -> Tensor:
        return torch.arange(len(self.levels), dtype=torch.uint8)

    @property
    def linear(self) -> tuple[str, ...]:
        return ("scale",)

    def cover(self, weight: Tensor) -> Params:
        low, high = (torch.from_numpy(part) for part in extremes(weight.contiguous().numpy(), self.columns))
        first, last = self.levels[0], self.levels[-1]
        if first == -last:
            return {"scale": to_half(torch.maximum(high, -low) / last)}
        return {"scale": to_half(torch.where(high >= -low, high, low) / (last if last > -first else first))}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        if not weight.numel():
            return {"scale": torch.zeros(len(weight), weight.shape[1] // self.columns, dtype=torch.float16)}
        mirror = self.levels[0] != -self.levels[-1]
        arrays = weights_of(weight, importance, self.columns)
        scales, _ = best_scales(*arrays, self.columns, self.grid, self._ratios(mirror), mirror, POLISH)
        return best_halves(self, *arrays, {"scale": torch.from_numpy(scales)})

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

    @property
    def alphabet(self) -> Tensor:
        return torch.arange(self.top + 1, dtype=torch.uint8)

    @property
    def linear(self) -> tuple[str, ...]:
        return ("scale", "minimum")

    def cover(self, weight: Tensor) -> Params:
        low, high = (torch.from_numpy(part) for part in extremes(weight.contiguous().numpy(), self.columns))
        return {"scale": to_half((high - low) / self.top), "minimum": to_half(low)}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        if not weight.numel():
            empty = torch.zeros(len(weight), weight.shape[1] // self.columns, dtype=torch.float16)
            return {"scale": empty, "minimum": empty.clone()}
        arrays = weights_of(weight, importance, self.columns)
        scale, minimum = map(torch.from_numpy, best_ranges(*arrays, self.columns, np.float32(self.top)))
        return best_halves(self, *arrays, {"scale": scale, "minimum": minimum})

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        return round_steps(weight, params["scale"].float(), params["minimum"].float(), self.top, noise)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        scale, minimum = (spread(params[key].float(), codes.shape[1]) for key in ("scale", "minimum"))
        return codes.float().mul_(scale).add_(minimum)


def round_steps(weight: Tensor, scale: Tensor, minimum: Tensor, top: int, noise: Tensor | None) -> Tensor:
    """Codes 0..top of scale * q + minimum, parameters [rows, groups]; nearest, or one of the two around by chance."""
    if noise is None:
        n = weight.shape[1] // max(1, scale.shape[1])
        x, s, m = (part.contiguous().numpy() for part in (weight, scale, minimum))
        return torch.from_numpy(nearest_steps(x, s, m, max(1, n), np.float32(top)))
    scale, minimum = (spread(part, weight.shape[1]) for part in (scale, minimum))
    steps = (weight - minimum).div_(torch.where(scale == 0, torch.inf, scale))
    return steps.add_(noise).floor_().clamp_(0, top).to(torch.uint8)


def best_halves(format: Block, x: Floats, importance: Floats, real: dict[str, Tensor]) -> Params:
    """Parameters [rows, blocks] as float16: the nearest; where it has few digits, the best of those on either side."""
    best: Params = {key: to_half(value) for key, value in real.items()}
    if not any(bool(((value != 0) & (value.abs() < FULL)).any()) for value in real.values()):
        return best
    weight, w = torch.from_numpy(x), torch.from_numpy(importance)

    def error(params: Params) -> Tensor:
        difference = format.decode(format.round(weight, params), params).sub_(weight)
        return difference.square_().mul_(w).view(len(weight), -1, format.columns).sum(-1)

    least = error(best)
    for sides in product((torch.floor, torch.ceil), repeat=len(real)):
        tried = {
            key: to_half(side(value / STEP) * STEP)
            for (key, value), side in zip(real.items(), sides, strict=True)
        }
        found = error(tried)
        best = {key: torch.where(found < least, value, best[key]) for key, value in tried.items()}
        least = torch.minimum(found, least)
    return best


def weights_of(weight: Tensor, importance: Tensor | None, span: int) -> tuple[Floats, Floats]:
    """Weight and importance [1, columns] as the compiled loops take them: positive, relative to the largest of a span.

    Raises:
        FormatError: weights whose squares would leave float32; no block's scale could hold them either.
    """
    if float(weight.abs().max()) > LARGEST:
        to_half(weight.abs().max())
    given = relative_importance(importance, weight.shape[1], span)
    return weight.contiguous().numpy(), given.view(1, -1).numpy()


@cache
def make_grid(levels: tuple[int, ...]) -> Levels:
    """Levels with boundaries halfway between."""
    values = np.array(levels, dtype=np.float32)
    return make_levels(values, (values[1:] + values[:-1]) / np.float32(2))


def high_bits(codes: Tensor) -> Tensor:
    """The fifth bits of 32 codes, [..., 32], as four bytes: code j is bit j of a little-endian number."""
    bits = (codes >> 4 & 1).view(*codes.shape[:-1], 4, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def from_high_bits(raw: Tensor) -> Tensor:
    """Inverse of ``high_bits``: 0 or 16 for each of 32 codes."""
    return (raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2) << 4
