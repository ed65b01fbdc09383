"""Q5_0 of llama.cpp: 5-bit integers, 32 to a float16 scale (ggml block_q5_0)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, from_nibbles, halves, nibbles
from poise.formats._scaled_block import ScaledBlock, from_high_bits, high_bits


@dataclass(frozen=True, kw_only=True)
class Q50(ScaledBlock):
    """w = d * (q - 16), q = 0..31; d may be negative. 5.5 bits a weight. d, the fifth bits, the low bits in pairs."""

    columns = 32
    nbytes = 22
    group = 32
    per = {"scale": 32}  # noqa: RUF012
    bits = 5
    levels = tuple(range(-16, 16))
    tries = (0.75, 9)

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, self.columns)
        return torch.cat((halves(params["scale"]), high_bits(blocks), nibbles(blocks & 15)), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        codes = from_nibbles(blocks[..., 6:]) | from_high_bits(blocks[..., 2:6])
        return codes.flatten(1), {"scale": from_halves(blocks[..., :2])}
