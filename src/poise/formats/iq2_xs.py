"""IQ2_XS of llama.cpp: 8 weights are one of 512 points and 7 signs; 2.3125 bits a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._lattice import EVEN, Lattice, from_little_endian, join, little_endian, runs, split


@dataclass(frozen=True, kw_only=True)
class Iq2Xs(Lattice):
    """w = d (2 s + 1) / 8 * sign * point; s of 4 bits for 16 weights, coordinates 8, 25, 43.

    ggml-common.h block_iq2_xs, 74 bytes: d; 32 x 16 bits of index (9) and signs (7); 8 bytes of s, low half first.
    """

    bits = 2
    width = 8
    nbytes = 74
    group = 16
    per = {"d": 256, "s": 16}  # noqa: RUF012
    table, signs, index_bits = "iq2_xs", EVEN, 9
    top, step = 15, 0.125
    reach, tries = (1 / 40, 1 / 8), 16

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        d, s = params["d"], runs(params["s"], 16)
        return torch.cat(
            (halves(d), little_endian(runs(codes, 32), 2), little_endian(join(s, 4, 2), 1)),
            dim=-1,
        )

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        d, codes = from_halves(blocks[..., :2]), from_little_endian(blocks[..., 2:66], 2)
        s = split(blocks[..., 66:], 4, 2)
        return codes.flatten(1), {"d": d, "s": s.flatten(1)}
