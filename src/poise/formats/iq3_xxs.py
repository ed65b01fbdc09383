"""IQ3_XXS of llama.cpp: 8 weights are two of 256 points of 4 and 7 signs; 3.0625 bits a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._lattice import EVEN, Lattice, from_little_endian, join, little_endian, runs, split


@dataclass(frozen=True, kw_only=True)
class Iq3Xxs(Lattice):
    """w = d (2 s + 1) / 4 * sign * point; s of 4 bits for 32 weights, coordinates 4 to 62.

    ggml-common.h block_iq3_xxs, 98 bytes: d; 64 bytes of indices; for each 32 weights 4 bytes of
    7 + 7 + 7 + 7 signs and s.
    """

    bits = 23 / 8
    width = 8
    nbytes = 98
    group = 32
    per = {"d": 256, "s": 32}  # noqa: RUF012
    table, signs, index_bits = "iq3_xxs", EVEN, 8
    top, step = 15, 0.25
    reach, tries = (1 / 40, 1 / 10), 20

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        codes, s = runs(codes, 32), runs(params["s"], 8)
        rest = join(codes >> 16, 7, 4) | s.long() << 28
        d = halves(params["d"])
        return torch.cat((d, little_endian(codes, 2), little_endian(rest, 4)), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        d, indices, rest = torch.split(blocks, [2, 64, 32], dim=-1)
        words = from_little_endian(rest, 4)
        codes = from_little_endian(indices, 2) | split(words, 7, 4).int() << 16
        s = (words >> 28).to(torch.uint8)
        return codes.flatten(1), {"d": from_halves(d), "s": s.flatten(1)}
