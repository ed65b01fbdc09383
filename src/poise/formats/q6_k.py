"""Q6_K of llama.cpp: 6-bit codes, 16 to an 8-bit scale with a sign, 256 to a float16 (ggml block_q6_K)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, from_nibbles, halves, nibbles
from poise.formats._kquant import SymmetricSuperBlock

PAIRS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)


@dataclass(frozen=True, kw_only=True)
class Q6K(SymmetricSuperBlock):
    """w = d sc (q - 32), q = 0..63, sc = -128..127. 6.5625 bits a weight.

    Two halves of 128 codes: low parts in pairs (j with j + 64), then high parts, byte j with codes j, j + 32, j + 64,
    j + 96 from its lowest bits up. Then sc, and d.
    """

    nbytes = 210
    group = 16
    per = {"d": 256, "scale": 16}  # noqa: RUF012
    bits = 6
    levels = tuple(range(-32, 32))
    low = -128
    high = 127

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, 2, 128)
        high = ((blocks >> 4).view(*blocks.shape[:3], 4, 32) << PAIRS).sum(-2, dtype=torch.uint8)
        scale = params["scale"].contiguous().view(torch.uint8).view(*blocks.shape[:2], 16)
        return torch.cat(
            (nibbles(blocks & 15).flatten(-2), high.flatten(-2), scale, halves(params["d"])), dim=-1
        )

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        low = from_nibbles(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64))
        high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32) >> PAIRS & 3
        codes = low | high.flatten(-2) << 4
        scale = blocks[..., 192:208].flatten(1).contiguous().view(torch.int8)
        return codes.flatten(1), {"d": from_halves(blocks[..., 208:]), "scale": scale}
