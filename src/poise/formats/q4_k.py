"""Q4_K of llama.cpp: 4-bit codes, 32 to a 6-bit scale and minimum, 256 to two float16 (ggml block_q4_K)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, from_nibbles, halves, nibbles
from poise.formats._kquant import AffineSuperBlock, from_sixes, sixes


@dataclass(frozen=True, kw_only=True)
class Q4K(AffineSuperBlock):
    """w = d sc q - dmin m, q = 0..15. 4.5 bits a weight. d, dmin, 12 bytes of sixes, each 64 codes in pairs."""

    nbytes = 144
    group = 32
    per = {"d": 256, "dmin": 256, "scale": 32, "minimum": 32}  # noqa: RUF012
    bits = 4
    top = 15
    most = 63

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, 4, 64)
        scales = sixes(params["scale"], params["minimum"])
        return torch.cat(
            (halves(params["d"]), halves(params["dmin"]), scales, nibbles(blocks).flatten(-2)), dim=-1
        )

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        d, dmin = from_halves(blocks[..., :2]), from_halves(blocks[..., 2:4])
        scale, minimum = from_sixes(blocks[..., 4:16])
        codes = from_nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
        return codes.flatten(1), {"d": d, "dmin": dmin, "scale": scale, "minimum": minimum}
