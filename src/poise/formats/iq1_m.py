"""IQ1_M of llama.cpp: 8 weights are one of 2048 ternary points, up or down; 1.75 bits a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves
from poise.formats._lattice import DELTA, NONE, Lattice, from_little_endian, join, little_endian, runs, split


@dataclass(frozen=True, kw_only=True)
class Iq1M(Lattice):
    """w = d (2 s + 1) (point + delta); s of 3 bits for 16 weights, the sign of delta = 1/8 for 8.

    A code is the index, and above it whether delta is negative. ggml-common.h block_iq1_m, 56 bytes: 32 bytes of the
    indices' low 8 bits; 16 of half bytes with their high 3 bits and the sign of delta; 4 x 16 bits of four s and, above
    them, four bits of d, from the lowest up.
    """

    bits = 12 / 8
    width = 8
    nbytes = 56
    group = 16
    per = {"d": 256, "s": 16}  # noqa: RUF012
    table, signs, index_bits = "iq1", NONE, 12
    top, step = 7, 1.0
    shifts = (DELTA, -DELTA)
    mixed = True
    reach, tries = (0.85, 2.3), 4

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        codes, s = runs(codes, 32), runs(params["s"], 16)
        d = params["d"].contiguous().view(torch.int16).unsqueeze(-1)
        scales = join(s, 3, 4) | split(d, 4, 4).long() << 12
        parts = ((codes, 1), (join(codes >> 8, 4, 2), 1), (scales, 2))
        return torch.cat([little_endian(fields, nbytes) for fields, nbytes in parts], dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        low, high, rest = torch.split(blocks, [32, 16, 8], dim=-1)
        scales = from_little_endian(rest, 2)
        codes = low.int() | split(high, 4, 2).int() << 8
        d = from_halves(little_endian(join(scales >> 12, 4, 4), 2))
        s = split(scales, 3, 4).to(torch.uint8)
        return codes.flatten(1), {"d": d, "s": s.flatten(1)}
