"""The lattice blocks of llama.cpp: several weights at once are one of a few hundred points.

A block of 256 weights has a float16 scale d, its groups of 16 or 32 a whole number s each:

    w = d (2 s + 1) step * sign * point

Codes are int32 [rows, columns / width], from the lowest bit up: the index of the point (of two points of four
coordinates in iq3_xxs), then the signs of all columns. Where the number of minus signs is even, the last column's sign
is left out.
"""

from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import Block, relative_importance, spread, to_half
from poise.formats._lattice_scales import BLOCK, fit_scales
from poise.formats._lattice_search import EVEN, FREE, NONE, Points, Shape, nearest_codes
from poise.tables import lattices

__all__ = ["EVEN", "FREE", "NONE", "Lattice"]

DELTA = 0.125
"""What iq1_s and iq1_m add to all coordinates of a point, or take away."""


class Lattice(Block):
    """Params: ``d`` float16 [rows, columns / 256], ``s`` uint8 [rows, groups]; iq1_s has ``variant`` beside ``s``.

    Attributes:
        table: name of the points.
        signs: ``NONE``: the points have them; ``FREE``: one for every column; ``EVEN``: an even number of minuses.
        index_bits: of a point's index.
        top: the largest s.
        step: scale of the points for d = 1 and s = 0.
        shifts: of all coordinates. One is chosen for a group, and is a parameter; or for a point, and is part of
            its index, where ``mixed``.
        reach: least and largest scale that is tried for a group, relative to its root mean square.
        tries: scales that are tried between these two.
    """

    columns = BLOCK
    table: ClassVar[str]
    signs: ClassVar[int]
    index_bits: ClassVar[int]
    top: ClassVar[int]
    step: ClassVar[float]
    shifts: ClassVar[tuple[float, ...]] = (0.0,)
    mixed: ClassVar[bool] = False
    reach: ClassVar[tuple[float, float]]
    tries: ClassVar[int]

    @property
    def points(self) -> Tensor:
        """[points, dimensions], one shift after the other."""
        return _points(self.table, self.shifts)

    @property
    def shape(self) -> Shape:
        return Shape(
            _transposed(self.table),
            np.array(self.shifts, dtype=np.float32),
            self.mixed,
            self.width,
            self.signs,
            self.index_bits,
            self.group,
            np.float32(self.step),
            self.top,
        )

    @property
    def linear(self) -> tuple[str, ...]:
        return ("d",)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        ratios = np.geomspace(*self.reach, self.tries, dtype=np.float32)
        given = relative_importance(importance, weight.shape[1], BLOCK).numpy()
        found = fit_scales(weight.contiguous().numpy(), given, self.shape, ratios)
        d, s, variant = map(torch.from_numpy, found)
        params = {"d": to_half(d), "s": s}
        return {**params, "variant": variant} if len(self.shifts) > 1 and not self.mixed else params

    def scale(self, params: Params) -> Tensor:
        """Of the points, float32 [rows, groups]; exact."""
        s = params["s"].float().mul_(2).add_(1)
        return spread(params["d"].float(), s.shape[1]) * (s * self.step)

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        self.refuse_noise(noise)
        units = weight.shape[1] // self.width
        scale = spread(self.scale(params), units).contiguous()
        variant = params.get("variant")
        kind = (
            torch.zeros_like(scale, dtype=torch.uint8)
            if variant is None
            else spread(variant, units).contiguous()
        )
        given = relative_importance(importance, weight.shape[1], self.width).numpy()
        arrays = (weight.contiguous().numpy(), given, scale.numpy(), kind.numpy())
        return torch.from_numpy(nearest_codes(*arrays, self.shape))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        rows, units = codes.shape
        points = self.points
        parts, last = self.width // points.shape[1], (1 << self.index_bits) - 1
        index = torch.stack([codes >> part * self.index_bits for part in range(parts)], -1) & last
        if (variant := params.get("variant")) is not None:
            index += spread(variant, units).int().unsqueeze(-1) * (last + 1)
        values = points[index].view(rows, units, self.width)
        if self.signs != NONE:
            values *= sign_table(self.width, self.signs)[codes >> parts * self.index_bits]
        values = values.view(rows, units * self.width)
        return values.mul_(spread(self.scale(params), values.shape[1]))


def runs(values: Tensor, length: int) -> Tensor:
    """[..., n] as [..., n / length, length]."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // length, length)


def little_endian(fields: Tensor, nbytes: int) -> Tensor:
    """The lowest bytes of every integer of [..., n], as uint8 [..., n nbytes]."""
    return runs(fields.long().contiguous().view(torch.uint8), 8)[..., :nbytes].flatten(-2)


def from_little_endian(raw: Tensor, nbytes: int) -> Tensor:
    """Inverse of ``little_endian``: int32, or int64 where there are four bytes."""
    fields = join(raw, 8, nbytes)
    return fields if nbytes > 3 else fields.int()


def join(fields: Tensor, bits: int, count: int) -> Tensor:
    """Runs of ``count`` fields of ``bits`` bits as one number each, the first in the lowest bits; int64."""
    return (runs(fields.long(), count) << torch.arange(0, bits * count, bits)).sum(-1)


def split(numbers: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of ``join``; bits above are ignored."""
    return (numbers.unsqueeze(-1) >> torch.arange(0, bits * count, bits) & (1 << bits) - 1).flatten(-2)


@cache
def _points(table: str, shifts: tuple[float, ...]) -> Tensor:
    return torch.cat([lattices()[table] + shift for shift in shifts])


@cache
def _transposed(table: str) -> Points:
    found: Points = lattices()[table].T.contiguous().numpy()
    return found


@cache
def sign_table(width: int, signs: int) -> Tensor:
    """+1 and -1 for every stored bit pattern, [patterns, width]."""
    patterns = torch.arange(1 << (width - 1 if signs == EVEN else width)).unsqueeze(1)
    minus = patterns >> torch.arange(width) & 1
    if signs == EVEN:
        minus[:, -1] = minus.sum(1) % 2
    return 1.0 - 2.0 * minus
