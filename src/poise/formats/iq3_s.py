"""IQ3_S of llama.cpp: 4 weights are one of 512 points and 4 signs; 3.4375 bits a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._lattice import FREE, Lattice, join, little_endian, runs, split


@dataclass(frozen=True, kw_only=True)
class Iq3S(Lattice):
    """w = d (2 s + 1) * sign * point; s of 4 bits for 32 weights, coordinates 1, 3, ... 15.

    ggml-common.h block_iq3_s, 110 bytes: d; 64 bytes of the indices' low 8 bits; 8 of their high bits; 32 of signs;
    4 of s, low half first.
    """

    bits = 13 / 4
    width = 4
    nbytes = 110
    group = 32
    per = {"d": 256, "s": 32}  # noqa: RUF012
    table, signs, index_bits = "iq3_s", FREE, 9
    top, step = 15, 1.0
    reach, tries = (1 / 11, 1.05), 32

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        codes, s = runs(codes, 64), runs(params["s"], 8)
        high, sign = join(codes >> 8 & 1, 1, 8), join(codes >> 9, 4, 2)
        tail = (little_endian(part, 1) for part in (codes, high, sign, join(s, 4, 2)))
        return torch.cat((halves(params["d"]), *tail), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        d, low, high, sign, s = torch.split(blocks, [2, 64, 8, 32, 4], dim=-1)
        codes = low.int() | split(high, 1, 8).int() << 8 | split(sign, 4, 2).int() << 9
        return codes.flatten(1), {"d": from_halves(d), "s": split(s, 4, 2).flatten(1)}
