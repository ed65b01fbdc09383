"""Vector quantization with learned codebooks, additive where there are several (AQLM, Egiazarian et al. 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from poise.core.bits import pack_bits, unpack_bits, words
from poise.core.errors import UsageError
from poise.core.format import Format, Params
from poise.core.slabs import map_slabs
from poise.formats._scales import DTYPES, Scales, divisor
from poise.formats._vector import beam_search, train

SAMPLE = 1 << 15
"""Vectors that codebooks are learned from, evenly spaced over the matrix: 128 for each of 256 codewords."""


@dataclass(frozen=True, kw_only=True)
class Vector(Format):
    """w = scale * sum_s codebook[s, q_s]: each ``dim`` neighbours of a row are one vector.

    Params: ``scale`` [rows, 1], the root mean square of the row; ``codebook`` float16 [stages, 2^b, dim] with
    b = bits * dim / stages, shared by the matrix. Codes are uint8 [rows, columns / dim, stages].

    Deviations from AQLM: codewords minimise the error of the weights, weighed by the importance of each column,
    not of the outputs; codes are found by beam search once, without the later tuning of a block.

    Attributes:
        bits: of a weight, 1 to 4.
        dim: columns of a vector, 2 to 8.
        stages: codewords that are added up.
        beam: sums that the search keeps after each stage.
        scale: dtype of the scales, ``float16``, ``bfloat16`` or ``float32``.
    """

    bits: int = 2
    dim: int = 4
    stages: int = 1
    beam: int = 8
    scale: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in range(1, 5) or self.dim not in range(2, 9):
            raise UsageError(f"vector takes 1 to 4 bits and a dim of 2 to 8, got {self.bits!r}, {self.dim!r}")
        if self.stages not in range(1, 9) or self.beam not in range(1, 65):
            raise UsageError(f"1 to 8 stages, a beam of 1 to 64, got {self.stages!r} and {self.beam!r}")
        if self.bits * self.dim % self.stages or self.bits * self.dim > 8 * self.stages:
            raise UsageError(
                f"{self.bits} bits of {self.dim} columns must be stages of the same 1 to 8 bits, "
                f"and {self.stages} are asked for"
            )
        if self.scale not in DTYPES:
            raise UsageError(f"scale is {', '.join(DTYPES)}, got {self.scale!r}")

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.dim

    @property
    def tile_rows(self) -> int:
        return 0

    @property
    def shared(self) -> frozenset[str]:
        return frozenset({"codebook"})

    @property
    def code_bits(self) -> int:
        """Of one codeword's index."""
        return self.bits * self.dim // self.stages

    def group_of(self, columns: int) -> int:
        return max(1, columns)

    def cover(self, weight: Tensor) -> Params:
        return self.fit(weight)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        scale = Scales(self.scale).store(_root_mean_square(weight))["scale"]
        books = torch.zeros(self.stages, self.dim, 1 << self.code_bits)
        if weight.numel():
            count = weight.shape[1] // self.dim
            chosen = torch.linspace(0, weight.shape[0] * count - 1, min(SAMPLE, weight.shape[0] * count))
            chosen = chosen.double().round().long()
            row, place = chosen // count, chosen % count
            x = weight.reshape(weight.shape[0], count, self.dim)[row, place] / divisor(scale.float())[row]
            w = self._weights(importance, weight.shape[1])[place]
            found = train(x.numpy(), w.numpy(), self.stages, 1 << self.code_bits, self.beam)
            books = torch.from_numpy(found)
        return {"scale": scale, "codebook": books.transpose(1, 2).half().contiguous()}

    def _weights(self, importance: Tensor | None, columns: int) -> Tensor:
        """[columns / dim, dim]; equal without any importance."""
        if importance is None or not bool(importance.any()):
            return torch.ones(columns // self.dim, self.dim)
        return (importance / importance.max()).view(-1, self.dim)

    def at(self, params: Params, columns: slice) -> Params:
        return params

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        self.refuse_noise(noise)
        rows, columns = weight.shape
        codes = torch.empty(rows, columns // self.dim, self.stages, dtype=torch.uint8)
        books = params["codebook"].float().transpose(1, 2).contiguous().numpy()
        w = self._weights(importance, columns).numpy()
        scale = divisor(params["scale"].float())

        def search(slab: slice) -> None:
            x = (weight[slab] / scale[slab]).reshape(-1, self.dim)
            found = beam_search(x.numpy(), w, books, np.int64(self.beam if self.stages > 1 else 1))
            codes[slab] = torch.from_numpy(found).view(-1, columns // self.dim, self.stages)

        if weight.numel():
            map_slabs(search, rows, columns)
        return codes

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        books = params["codebook"].float()
        total = books[0][codes[..., 0].int()]
        for stage in range(1, self.stages):
            total += books[stage][codes[..., stage].int()]
        return total.flatten(1).mul_(params["scale"].float())

    def bits_per_weight(self, rows: int, columns: int) -> float:
        codes = 32 * rows * words(columns // self.dim * self.stages, self.code_bits)
        books = 16 * self.stages * self.dim << self.code_bits
        return (codes + 8 * DTYPES[self.scale].itemsize * rows + books) / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``packed`` int32 [rows, words]: the codes of a vector's stages one after the other; and the parameters."""
        return {"packed": pack_bits(codes.flatten(1), self.code_bits), **params}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        count = columns // self.dim
        codes = unpack_bits(stored["packed"], self.code_bits, count * self.stages)
        params = {"scale": stored["scale"], "codebook": stored["codebook"]}
        return codes.view(codes.shape[0], count, self.stages), params


def _root_mean_square(weight: Tensor) -> Tensor:
    """[rows, 1], of any finite weights."""
    if not weight.numel():
        return weight.new_zeros(weight.shape[0], 1)
    largest = weight.abs().amax(1, keepdim=True)
    return largest * (weight / torch.where(largest == 0, 1, largest)).square().mean(1, keepdim=True).sqrt()
