"""Q8_0 of llama.cpp: 8-bit integers, 32 to a float16 scale (ggml block_q8_0)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._scaled_block import ScaledBlock


@dataclass(frozen=True, kw_only=True)
class Q80(ScaledBlock):
    """w = d * (q - 128), q = 0..255; d may be negative. 8.5 bits a weight. d, then signed bytes."""

    columns = 32
    nbytes = 34
    group = 32
    per = {"scale": 32}  # noqa: RUF012
    bits = 8
    levels = tuple(range(-128, 128))
    tries = (0.97, 3)

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, self.columns)
        return torch.cat((halves(params["scale"]), blocks ^ 128), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        return (blocks[..., 2:] ^ 128).flatten(1), {"scale": from_halves(blocks[..., :2])}
