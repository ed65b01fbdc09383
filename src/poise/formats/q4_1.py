"""Q4_1 of llama.cpp: 4-bit integers, 32 to a float16 scale and minimum (ggml block_q4_1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, from_nibbles, halves, nibbles
from poise.formats._scaled_block import RangeBlock


@dataclass(frozen=True, kw_only=True)
class Q41(RangeBlock):
    """w = d * q + m, q = 0..15. 5 bits a weight. d, m, then codes in pairs."""

    nbytes = 20
    bits = 4
    top = 15

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, self.columns)
        return torch.cat((halves(params["scale"]), halves(params["minimum"]), nibbles(blocks)), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        params = {"scale": from_halves(blocks[..., :2]), "minimum": from_halves(blocks[..., 2:4])}
        return from_nibbles(blocks[..., 4:]).flatten(1), params
