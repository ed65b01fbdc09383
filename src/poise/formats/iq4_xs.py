"""IQ4_XS of llama.cpp: a fixed table of 16 levels, 32 weights to a 6-bit scale, 256 to a float16 (ggml block_iq4_xs)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, from_nibbles, halves, nibbles
from poise.formats._kquant import SymmetricSuperBlock

PAIRS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Iq4Xs(SymmetricSuperBlock):
    """w = d sc LEVELS[q], sc = -32..31; the table is that of IQ4_NL. 4.25 bits a weight.

    d, two bytes of the scales' high pairs of bits, four of their low halves (scales plus 32), each 32 codes in pairs.
    """

    nbytes = 136
    group = 32
    per = {"d": 256, "scale": 32}  # noqa: RUF012
    bits = 4
    levels = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    low = -32
    high = 31

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, 8, 32)
        scale = (params["scale"] + 32).view(torch.uint8).view(*blocks.shape[:2], 8)
        high = ((scale >> 4).view(*blocks.shape[:2], 2, 4) << PAIRS).sum(-1, dtype=torch.uint8)
        low = scale[..., ::2] & 15 | (scale[..., 1::2] & 15) << 4
        return torch.cat((halves(params["d"]), high, low, nibbles(blocks).flatten(-2)), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        high = (blocks[..., 2:4].unsqueeze(-1) >> PAIRS & 3).flatten(-2)
        low = torch.stack((blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4), dim=-1).flatten(-2)
        scale = (low | high << 4).flatten(1).view(torch.int8) - 32
        codes = from_nibbles(blocks[..., 8:].reshape(*blocks.shape[:2], 8, 16))
        return codes.flatten(1), {"d": from_halves(blocks[..., :2]), "scale": scale}
