"""Learned levels for every row or group (Kim et al. 2023, SqueezeLLM, arXiv 2306.07629, equation 3)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from poise.core.bits import pack_bits, unpack_bits, words
from poise.core.errors import UsageError
from poise.core.format import Format, Params
from poise.formats._kmeans import codebooks, nearest_levels
from poise.formats._scales import DTYPES, Scales


@dataclass(frozen=True, kw_only=True)
class Kmeans(Format):
    """w = codebook[q]: 2^bits levels that minimise sum_j importance_j (w_j - w'_j)^2, one-dimensional k-means.

    Params: ``codebook`` [rows, groups, 2^bits], ascending. Codes are uint8 [rows, columns].

    On long Gaussian rows the error is that of Lloyd-Max quantizers (Max 1960). Deviations: SqueezeLLM weighs by the
    diagonal Fisher information of each weight, here by the importance of each column; its sparse outliers are not
    part of the grid.

    Attributes:
        bits: 1 to 8.
        group: columns that share levels, at least 16, or ``"channel"``, a row.
        scale: dtype of the levels, ``float16``, ``bfloat16`` or ``float32``.
    """

    bits: int = 4
    group: int | str = "channel"
    scale: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise UsageError(f"kmeans takes 1 to 8 bits, got {self.bits!r}")
        if self.group != "channel" and not (type(self.group) is int and self.group >= 16):
            raise UsageError(f'group is at least 16, or "channel", got {self.group!r}')
        if self.scale not in DTYPES:
            raise UsageError(f"scale is {', '.join(DTYPES)}, got {self.scale!r}")

    @property
    def alphabet(self) -> Tensor:
        return torch.arange(1 << self.bits, dtype=torch.uint8)

    def group_of(self, columns: int) -> int:
        return max(1, columns if self.group == "channel" else min(int(self.group), columns))

    def cover(self, weight: Tensor) -> Params:
        return self.fit(weight)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        rows, columns = weight.shape
        n = self.group_of(columns)
        whole = columns - columns % n
        parts = [weight.new_zeros(rows, 0, 1 << self.bits)]
        for first, last, size in ((0, whole, n), (whole, columns, columns - whole)):
            if rows and last > first:
                x = weight[:, first:last].reshape(-1, size).numpy()
                w = None if importance is None else importance[first:last].reshape(-1, size).numpy()
                parts.append(torch.from_numpy(codebooks(x, w, 1 << self.bits)).view(rows, -1, 1 << self.bits))
        return {"codebook": Scales(self.scale).store(torch.cat(parts, dim=1))["scale"]}

    def at(self, params: Params, columns: slice) -> Params:
        codebook = params["codebook"]
        if codebook.shape[1] == 1:
            return params
        n = self.group_of(columns.stop)
        return {"codebook": codebook[:, columns.start // n : -(-columns.stop // n)]}

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        if not weight.numel():
            return torch.empty(weight.shape, dtype=torch.uint8)
        levels = params["codebook"].float()
        n = self.group_of(weight.shape[1]) if levels.shape[1] > 1 else weight.shape[1]
        nearest = torch.from_numpy(
            nearest_levels(weight.contiguous().numpy(), levels.contiguous().numpy(), np.int64(n))
        )
        if noise is None:
            return nearest
        return self._by_chance(weight, nearest, params, noise)

    def _by_chance(self, weight: Tensor, nearest: Tensor, params: Params, noise: Tensor) -> Tensor:
        """The nearest level or the next one on the other side of the weight, so that the mean is the weight."""
        value = self.decode(nearest, params)
        step = torch.sign(weight - value).to(torch.int16)
        other = (nearest.to(torch.int16) + step).clamp(0, (1 << self.bits) - 1).to(torch.uint8)
        gap = self.decode(other, params) - value
        share = torch.where(gap == 0, 0.0, (weight - value) / gap)
        return torch.where(noise < share, other, nearest)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        rows, columns = codes.shape
        levels = params["codebook"].float()
        if not codes.numel():
            return levels.new_zeros(rows, columns)
        n = self.group_of(columns) if levels.shape[1] > 1 else columns
        start = torch.arange(columns, dtype=torch.int32) // n << self.bits
        return levels.flatten(1).gather(1, (codes + start).long())

    def bits_per_weight(self, rows: int, columns: int) -> float:
        groups = -(-columns // self.group_of(columns))
        levels = 8 * DTYPES[self.scale].itemsize * groups << self.bits
        return rows * (32 * words(columns, self.bits) + levels) / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``packed`` int32 [rows, words] of the codes, and the codebooks."""
        return {"packed": pack_bits(codes, self.bits), **params}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        codes = unpack_bits(stored["packed"], self.bits, columns)
        return codes, {"codebook": stored["codebook"]}
