"""IQ2_S of llama.cpp: 8 weights are one of 1024 points and 8 signs; 2.5625 bits a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._lattice import FREE, Lattice, join, little_endian, runs, split


@dataclass(frozen=True, kw_only=True)
class Iq2S(Lattice):
    """w = d (2 s + 1) / 8 * sign * point; s of 4 bits for 16 weights, coordinates 8, 25, 43.

    ggml-common.h block_iq2_s, 82 bytes: d; 32 bytes of the indices' low 8 bits; 32 of signs; 8 of their high 2
    bits; 8 of s, low half first.
    """

    bits = 18 / 8
    width = 8
    nbytes = 82
    group = 16
    per = {"d": 256, "s": 16}  # noqa: RUF012
    table, signs, index_bits = "iq2_s", FREE, 10
    top, step = 15, 0.125
    reach, tries = (1 / 40, 1 / 8), 16

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        codes, s = runs(codes, 32), runs(params["s"], 16)
        low, sign, high = little_endian(codes, 1), little_endian(codes >> 10, 1), codes >> 8 & 3
        parts = (halves(params["d"]), low, sign, little_endian(join(high, 2, 4), 1))
        return torch.cat((*parts, little_endian(join(s, 4, 2), 1)), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        d, low, sign, high, s = torch.split(blocks, [2, 32, 32, 8, 8], dim=-1)
        codes = low.int() | split(high, 2, 4).int() << 8 | sign.int() << 10
        return codes.flatten(1), {"d": from_halves(d), "s": split(s, 4, 2).flatten(1)}
