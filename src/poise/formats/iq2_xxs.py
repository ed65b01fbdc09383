"""IQ2_XXS of llama.cpp: 8 weights are one of 256 points and 7 signs; 2.0625 bits a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._lattice import EVEN, Lattice, from_little_endian, join, little_endian, runs, split


@dataclass(frozen=True, kw_only=True)
class Iq2Xxs(Lattice):
    """w = d (2 s + 1) / 8 * sign * point; s of 4 bits for 32 weights, coordinates 8, 25, 43.

    ggml-common.h block_iq2_xxs, 66 bytes: d; then for each 32 weights 4 bytes of indices and 4 bytes of
    7 + 7 + 7 + 7 signs and s.
    """

    bits = 15 / 8
    width = 8
    nbytes = 66
    group = 32
    per = {"d": 256, "s": 32}  # noqa: RUF012
    table, signs, index_bits = "iq2_xxs", EVEN, 8
    top, step = 15, 0.125
    reach, tries = (1 / 40, 1 / 8), 16

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        codes = runs(codes, 32)
        s = runs(params["s"], 8)
        indices = runs(little_endian(codes & 255, 1), 4)
        rest = runs(little_endian(join(codes >> 8, 7, 4) | s.long() << 28, 4), 4)
        body = torch.cat((indices, rest), dim=-1).flatten(2)
        return torch.cat((halves(params["d"]), body), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        body = runs(blocks[..., 2:], 8)
        rest = from_little_endian(body[..., 4:], 4).squeeze(-1)
        codes = body[..., :4].flatten(2).int() | split(rest, 7, 4).int() << 8
        s = (rest >> 28).to(torch.uint8)
        return codes.flatten(1), {"d": from_halves(blocks[..., :2]), "s": s.flatten(1)}
