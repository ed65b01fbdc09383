"""IQ1_S of llama.cpp: 8 weights are one of 2048 ternary points; 1.5625 bits a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._lattice import DELTA, NONE, Lattice, from_little_endian, join, little_endian, runs, split


@dataclass(frozen=True, kw_only=True)
class Iq1S(Lattice):
    """w = d (2 s + 1) (point + delta); s of 3 bits and the sign of delta = 1/8 for 32 weights.

    ggml-common.h block_iq1_s, 50 bytes: d; 32 bytes of the indices' low 8 bits; for each 32 weights 16 bits of
    3 + 3 + 3 + 3 high bits, s, and whether delta is negative (``variant``).
    """

    bits = 11 / 8
    width = 8
    nbytes = 50
    group = 32
    per = {"d": 256, "s": 32, "variant": 32}  # noqa: RUF012
    table, signs, index_bits = "iq1", NONE, 11
    top, step = 7, 1.0
    shifts = (DELTA, -DELTA)
    reach, tries = (0.85, 2.3), 4

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        codes = runs(codes, 32)
        s, variant = (runs(params[key], 8).long() for key in ("s", "variant"))
        high = join(codes >> 8, 3, 4) | s << 12 | variant << 15
        d = halves(params["d"])
        return torch.cat((d, little_endian(codes, 1), little_endian(high, 2)), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        d, low, rest = torch.split(blocks, [2, 32, 16], dim=-1)
        high = from_little_endian(rest, 2)
        codes = low.int() | split(high, 3, 4).int() << 8
        s, variant = ((high >> shift & mask).to(torch.uint8) for shift, mask in ((12, 7), (15, 1)))
        return codes.flatten(1), {
            "d": from_halves(d),
            "s": s.flatten(1),
            "variant": variant.flatten(1),
        }
