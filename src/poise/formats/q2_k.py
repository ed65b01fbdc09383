"""Q2_K of llama.cpp: 2-bit codes, 16 to a 4-bit scale and minimum, 256 to two float16 (ggml block_q2_K)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._kquant import AffineSuperBlock, from_quarters, quarters


@dataclass(frozen=True, kw_only=True)
class Q2K(AffineSuperBlock):
    """w = d sc q - dmin m, q = 0..3. 2.625 bits a weight. 16 bytes sc | m << 4, codes in quarters, d, dmin."""

    nbytes = 84
    group = 16
    per = {"d": 256, "dmin": 256, "scale": 16, "minimum": 16}  # noqa: RUF012
    bits = 2
    top = 3
    most = 15

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, self.columns)
        scales = (params["scale"] | params["minimum"] << 4).view(*blocks.shape[:2], 16)
        return torch.cat((scales, quarters(blocks), halves(params["d"]), halves(params["dmin"])), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        scales, codes = blocks[..., :16], from_quarters(blocks[..., 16:80])
        d, dmin = from_halves(blocks[..., 80:82]), from_halves(blocks[..., 82:])
        whole = {"scale": (scales & 15).flatten(1), "minimum": (scales >> 4).flatten(1)}
        return codes.flatten(1), {"d": d, "dmin": dmin, **whole}
