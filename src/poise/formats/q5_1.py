"""Q5_1 of llama.cpp: 5-bit integers, 32 to a float16 scale and minimum (ggml block_q5_1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, from_nibbles, halves, nibbles
from poise.formats._scaled_block import RangeBlock, from_high_bits, high_bits


@dataclass(frozen=True, kw_only=True)
class Q51(RangeBlock):
    """w = d * q + m, q = 0..31. 6 bits a weight. d, m, the fifth bits, the low bits in pairs."""

    nbytes = 24
    bits = 5
    top = 31

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, self.columns)
        scales = halves(params["scale"]), halves(params["minimum"])
        return torch.cat((*scales, high_bits(blocks), nibbles(blocks & 15)), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        params = {"scale": from_halves(blocks[..., :2]), "minimum": from_halves(blocks[..., 2:4])}
        codes = from_nibbles(blocks[..., 8:]) | from_high_bits(blocks[..., 4:8])
        return codes.flatten(1), params
