"""Trellis coding with a code that is computed, not stored (Tseng et al. 2024, QTIP, arXiv 2406.11235)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from poise.core.bits import pack_bits, unpack_bits, words
from poise.core.errors import UsageError
from poise.core.format import Format, Params
from poise.formats._scales import DTYPES, Scales
from poise.formats._trellis import Floats, encode, free_error

WINDOW = 128
"""Weights about the seam that decide where a path closes: half of a tile of 256, at 1.005 times the error of all."""
RATIOS = (0.7, 0.77, 0.84, 0.9, 0.95, 1.0, 1.06, 1.13, 1.22, 1.35)
"""Scales that are tried, as multiples of what gives the code and the row the same mean square."""
SAMPLE = 512
"""Columns that a row's scale is chosen on."""
POLISH = 256
"""Columns that are encoded to see whether the weights were decoded before: then they get the scale that they had."""
DECODED = 0.25
"""Share of 4^-bits, the least that a code can leave of Gaussian weights, up to which they are taken for that."""
SMALL = 10
"""Most bits of state of the trellis that scales are chosen with; 12 lower the error by half a percent."""


@dataclass(frozen=True, kw_only=True)
class Trellis(Format):
    """w = scale * code(state): the state is the last ``state`` bits of a closed stream of ``bits`` bits a weight.

    The stream runs through tiles of ``tile`` rows and ``width`` columns, row by row (the last tile of a matrix may have
    fewer rows, at more error); ``round`` minimises sum_ij importance_j (w_ij - w'_ij)^2 of a tile by Viterbi's algorithm,
    exactly but for the choice of the seam. The code is 3INST (algorithm 2 of the paper): with X = 89226354 s + 64248484 mod 2^32 and Y = X & 0x8FFF8FFF ^
    0x3B603B60, the sum of the two halves of Y as float16 numbers. It is all but Gaussian: weights should be as well,
    rotate them if not.

    Params: ``scale`` [rows, 1]. Codes are the states, int16 [rows, columns / width, width], so that any row can be
    decoded by itself; stored are the ``bits`` new bits of each.

    Deviations: a state of 14 bits, not 16 (4 % more error in a quarter of the time); the seam is chosen on
    a window, not on all the tile; a scale a row, not a matrix.

    Attributes:
        bits: 1 to 4.
        state: 8 to 16; one bit more takes twice the time.
        tile: rows of a tile.
        width: columns of a tile.
        scale: dtype of the scales, ``float16``, ``bfloat16`` or ``float32``.
    """

    bits: int = 2
    state: int = 14
    tile: int = 16
    width: int = 16
    scale: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in range(1, 5):
            raise UsageError(f"trellis takes 1 to 4 bits, got {self.bits!r}")
        if self.state not in range(8, 17):
            raise UsageError(f"trellis takes a state of 8 to 16 bits, got {self.state!r}")
        if self.tile < 1 or self.width * self.bits < self.state:
            raise UsageError(
                f"a tile has a row and at least {-(-self.state // self.bits)} columns, "
                f"to hold a state of {self.state} bits; got {self.tile!r} x {self.width!r}"
            )
        if self.scale not in DTYPES:
            raise UsageError(f"scale is {', '.join(DTYPES)}, got {self.scale!r}")

    @property
    def tile_rows(self) -> int:
        return self.tile

    def group_of(self, columns: int) -> int:
        return max(1, columns)

    def cover(self, weight: Tensor) -> Params:
        return self.fit(weight)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        if not weight.numel():
            return Scales(self.scale).store(torch.zeros(weight.shape[0], 1))
        largest = weight.abs().amax(1, keepdim=True)
        x = weight / torch.where(largest == 0, 1, largest)
        w = _relative(importance, weight.shape[1], weight.shape[1])
        scale = Scales(self.scale).store(self._search(x, w) * largest)["scale"].float()
        n = min(weight.shape[1], max(1, POLISH // self.width) * self.width)
        part = None if importance is None else importance[:n]
        params = {"scale": scale}
        v = self.decode(self.round(weight[:, :n], params, part), params)
        v /= torch.where(largest == 0, 1, largest)
        wv = w[:, :n] * v
        fitted, power = (wv * x[:, :n]).sum(1, keepdim=True), (wv * v).sum(1, keepdim=True)
        energy = (w[:, :n] * x[:, :n].square()).sum(1, keepdim=True)
        decoded = (fitted > 0) & (fitted.square() > (1 - DECODED * 4.0**-self.bits) * energy * power)
        factor = torch.where(decoded, fitted / power, 1)
        return Scales(self.scale).store(scale * factor)

    def _search(self, x: Tensor, w: Tensor) -> Tensor:
        """The scale of each row under which a trellis of few states errs least, [rows, 1]."""
        step = -(-x.shape[1] // SAMPLE)
        w = w.expand_as(x)
        mean = ((w * x.square()).sum(1, keepdim=True) / w.sum(1, keepdim=True)).sqrt()
        unit = mean / code_of(self.state).square().mean().sqrt()
        small = _small(self.state, self.bits)
        x, w = x[:, ::step].contiguous(), w[:, ::step].contiguous()
        errors = []
        for ratio in RATIOS:
            tried = ratio * torch.where(unit == 0, 1, unit)
            found = free_error((x / tried).numpy(), w.numpy(), small, self.bits)
            errors.append(torch.from_numpy(found) * tried[:, 0].square())
        return torch.tensor(RATIOS)[torch.stack(errors).argmin(0)].unsqueeze(1) * unit

    def at(self, params: Params, columns: slice) -> Params:
        return params

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        self.refuse_noise(noise)
        rows, columns = weight.shape
        codes = torch.empty(rows, columns // self.width, self.width, dtype=torch.int16)
        scale = params["scale"].float()
        w = _relative(importance, columns, self.width)
        for part in self._parts(rows):
            if columns and part.stop > part.start:
                x = self._sequences(weight[part] / torch.where(scale[part] == 0, torch.inf, scale[part]))
                size = scale[part].view(-1, self._rows(part), 1).abs()
                share = (size / size.amax(1, keepdim=True).clamp(min=1e-38)).square().view(-1, 1)
                weights = self._sequences(w * share)
                code = _by_branch(self.state, self.bits)
                window = np.int64(min(WINDOW, x.shape[1]))
                states = torch.from_numpy(encode(x.numpy(), weights.numpy(), code, self.bits, window))
                codes[part] = self._rows_of(states, part, columns)
        return codes

    def _parts(self, rows: int) -> list[slice]:
        """Rows of whole tiles, and of what remains."""
        whole = rows - rows % self.tile
        return [slice(0, whole), slice(whole, rows)]

    def _rows(self, part: slice) -> int:
        """Of a tile in one of the parts."""
        rows: int = min(self.tile, max(1, part.stop - part.start))
        return rows

    def _sequences(self, values: Tensor) -> Tensor:
        """[rows, columns] of one part as [tiles, weights of a tile]."""
        rows = min(self.tile, values.shape[0])
        tiles = values.reshape(-1, rows, values.shape[1] // self.width, self.width)
        return tiles.transpose(1, 2).reshape(-1, rows * self.width)

    def _rows_of(self, sequences: Tensor, part: slice, columns: int) -> Tensor:
        """Inverse of ``_sequences``: [rows, columns / width, width]."""
        tiles = sequences.view(-1, columns // self.width, self._rows(part), self.width)
        return tiles.transpose(1, 2).reshape(-1, columns // self.width, self.width)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        values = code_of(self.state)[codes.int() & ((1 << self.state) - 1)]
        return values.flatten(1).mul_(params["scale"].float())

    def bits_per_weight(self, rows: int, columns: int) -> float:
        codes = 32 * words(columns, self.bits)
        return rows * (codes + 8 * DTYPES[self.scale].itemsize) / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``packed`` int32 [rows, words] of the new bits of the states, and ``scale``.

        Raises:
            UsageError: the rows are no whole tiles.
        """
        fresh = (codes.flatten(1) & ((1 << self.bits) - 1)).to(torch.uint8)
        if not torch.equal(self._states(fresh), codes):
            raise UsageError(f"rows of a trellis are stored in tiles of {self.tile}, which were taken apart")
        return {"packed": pack_bits(fresh, self.bits), **params}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        fresh = unpack_bits(stored["packed"], self.bits, columns)
        return self._states(fresh), {"scale": stored["scale"]}

    def _states(self, fresh: Tensor) -> Tensor:
        """The states of streams, given as the new bits of every weight, uint8 [rows, columns]."""
        rows, columns = fresh.shape
        states = torch.empty(rows, columns // self.width, self.width, dtype=torch.int16)
        for part in self._parts(rows):
            if columns and part.stop > part.start:
                stream = self._sequences(fresh[part]).int()
                joined = stream.clone()
                for back in range(1, -(-self.state // self.bits)):
                    joined |= stream.roll(back, dims=1) << back * self.bits
                joined &= (1 << self.state) - 1
                states[part] = self._rows_of(joined, part, columns).to(torch.int16)
        return states


def _relative(importance: Tensor | None, columns: int, n: int) -> Tensor:
    """Importance [1, columns] in units of the largest of each n columns; equal where there is none."""
    if importance is None or not columns:
        return torch.ones(1, columns)
    blocks = importance.float().view(-1, n)
    largest = blocks.amax(1, keepdim=True)
    return torch.where(largest > 0, blocks / largest, 1).view(1, columns)


@cache
def code_of(state: int) -> Tensor:
    """3INST: the value of every state, float32 [2^state]."""
    s = np.arange(1 << state, dtype=np.uint64)
    y = ((s * 89226354 + 64248484) & 0x8FFF8FFF ^ 0x3B603B60).astype(np.uint32)
    halves = y.view(np.uint16).view(np.float16).astype(np.float32).reshape(-1, 2)
    return torch.from_numpy(halves.sum(1))


@cache
def _by_branch(state: int, bits: int) -> Floats:
    """The code with state p 2^bits + b at b 2^(state - bits) + p."""
    return _turn(code_of(state), bits)


@cache
def _small(state: int, bits: int) -> Floats:
    """A code of few states with the distribution of the one of ``state`` bits, ordered like ``_by_branch``."""
    few = min(SMALL, state)
    quantiles = code_of(state).sort().values.view(1 << few, -1).mean(1)
    return _turn(quantiles[code_of(few).argsort(stable=True).argsort()], bits)


def _turn(code: Tensor, bits: int) -> Floats:
    return code.view(-1, 1 << bits).t().contiguous().view(-1).numpy()
