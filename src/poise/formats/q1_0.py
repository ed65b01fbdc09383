"""Q1_0 of llama.cpp: signs, 128 to a float16 scale (ggml block_q1_0)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._scaled_block import ScaledBlock

BITS = torch.arange(8, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Q10(ScaledBlock):
    """w = d for a set bit, -d for a clear one; bit j % 8 of byte j / 8. 1.125 bits a weight.

    The best scale is the weighted mean of |w| (Rastegari et al. 2016, XNOR-Net, equation 6).
    """

    columns = 128
    nbytes = 18
    group = 128
    per = {"scale": 128}  # noqa: RUF012
    bits = 1
    levels = (-1, 1)
    tries = (0.3, 1)

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        bits = codes.view(codes.shape[0], -1, 16, 8) << BITS
        return torch.cat((halves(params["scale"]), bits.sum(-1, dtype=torch.uint8)), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        codes = blocks[..., 2:].unsqueeze(-1) >> BITS & 1
        return codes.flatten(1), {"scale": from_halves(blocks[..., :2])}
