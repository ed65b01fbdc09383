"""Q2_0 of llama.cpp: four levels, 64 weights to a float16 scale (ggml block_q2_0)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._scaled_block import ScaledBlock

SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Q20(ScaledBlock):
    """w = d * (q - 1), q = 0..3, that is -d, 0, d, 2 d; d may be negative. 2.25 bits a weight.

    Byte j holds codes 4 j to 4 j + 3 from its lowest bits up.
    """

    columns = 64
    nbytes = 18
    group = 64
    per = {"scale": 64}  # noqa: RUF012
    bits = 2
    levels = (-1, 0, 1, 2)
    tries = (0.25, 12)

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        fours = codes.view(codes.shape[0], -1, 16, 4) << SHIFTS
        return torch.cat((halves(params["scale"]), fours.sum(-1, dtype=torch.uint8)), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        codes = blocks[..., 2:].unsqueeze(-1) >> SHIFTS & 3
        return codes.flatten(1), {"scale": from_halves(blocks[..., :2])}
