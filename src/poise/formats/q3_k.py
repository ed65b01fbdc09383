"""Q3_K of llama.cpp: 3-bit codes, 16 to a 6-bit scale with a sign, 256 to a float16 (ggml block_q3_K)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._kquant import SymmetricSuperBlock, from_quarters, quarters

EIGHT = torch.arange(8, dtype=torch.uint8).view(8, 1)
PAIRS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)


@dataclass(frozen=True, kw_only=True)
class Q3K(SymmetricSuperBlock):
    """w = d sc (q - 4), q = 0..7, sc = -32..31. 3.4375 bits a weight.

    32 bytes of third bits (bit g of byte j: code 32 g + j), low parts in quarters, 12 bytes of scales plus 32, d. Scale j
    has its low four bits in byte j % 8 (low half for j < 8) and its high two in byte 8 + j % 4, at bit 2 (j // 4).
    """

    nbytes = 110
    group = 16
    per = {"d": 256, "scale": 16}  # noqa: RUF012
    bits = 3
    levels = tuple(range(-4, 4))
    low = -32
    high = 31

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, self.columns)
        high = ((blocks >> 2).view(*blocks.shape[:2], 8, 32) << EIGHT).sum(-2, dtype=torch.uint8)
        scale = (params["scale"] + 32).view(torch.uint8).view(*blocks.shape[:2], 16)
        low = scale[..., :8] & 15 | (scale[..., 8:] & 15) << 4
        top = ((scale >> 4).view(*blocks.shape[:2], 4, 4) << PAIRS).sum(-2, dtype=torch.uint8)
        return torch.cat((high, quarters(blocks & 3), low, top, halves(params["d"])), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        high = (blocks[..., :32].unsqueeze(-2) >> EIGHT & 1).flatten(-2)
        codes = from_quarters(blocks[..., 32:96]) | high << 2
        low, top = blocks[..., 96:104], blocks[..., 104:108].unsqueeze(-2) >> PAIRS & 3
        scale = torch.cat((low & 15, low >> 4), dim=-1) | top.flatten(-2) << 4
        return codes.flatten(1), {
            "d": from_halves(blocks[..., 108:]),
            "scale": scale.flatten(1).view(torch.int8) - 32,
        }
