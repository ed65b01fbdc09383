"""Q5_K of llama.cpp: 5-bit codes, 32 to a 6-bit scale and minimum, 256 to two float16 (ggml block_q5_K)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, from_nibbles, halves, nibbles
from poise.formats._kquant import AffineSuperBlock, from_sixes, sixes

EIGHT = torch.arange(8, dtype=torch.uint8).view(8, 1)


@dataclass(frozen=True, kw_only=True)
class Q5K(AffineSuperBlock):
    """w = d sc q - dmin m, q = 0..31. 5.5 bits a weight.

    d, dmin, 12 bytes of sixes, 32 bytes of fifth bits (bit g of byte j: code j of group g), each 64 low parts in pairs.
    """

    nbytes = 176
    group = 32
    per = {"d": 256, "dmin": 256, "scale": 32, "minimum": 32}  # noqa: RUF012
    bits = 5
    top = 31
    most = 63

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, 8, 32)
        high = ((blocks >> 4) << EIGHT).sum(-2, dtype=torch.uint8)
        low = nibbles((blocks & 15).reshape(*blocks.shape[:2], 4, 64)).flatten(-2)
        scales = sixes(params["scale"], params["minimum"])
        return torch.cat((halves(params["d"]), halves(params["dmin"]), scales, high, low), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        d, dmin = from_halves(blocks[..., :2]), from_halves(blocks[..., 2:4])
        scale, minimum = from_sixes(blocks[..., 4:16])
        high = blocks[..., 16:48].unsqueeze(-2) >> EIGHT & 1
        low = from_nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).flatten(-2)
        codes = low | high.flatten(-2) << 4
        return codes.flatten(1), {"d": d, "dmin": dmin, "scale": scale, "minimum": minimum}
