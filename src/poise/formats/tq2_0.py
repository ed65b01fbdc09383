"""TQ2_0 of llama.cpp: ternary, two bits a weight, 256 to a float16 scale (ggml block_tq2_0)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._scaled_block import ScaledBlock

SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)


@dataclass(frozen=True, kw_only=True)
class Tq20(ScaledBlock):
    """w = d * (q - 1), q = 0, 1, 2. 2.0625 bits a weight.

    64 bytes hold two halves of 128 codes: byte m of a half has codes m, m + 32, m + 64, m + 96 from its lowest bits up. A
    block may hold q = 3 and decodes to 2 d; it is never written, so that the format stays ternary.
    """

    columns = 256
    nbytes = 66
    group = 256
    per = {"scale": 256}  # noqa: RUF012
    bits = 2
    levels = (-1, 0, 1)
    tries = (0.2, 12)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return (codes.float() - 1).mul_(
            params["scale"].float().repeat_interleave(codes.shape[1] // params["scale"].shape[1], 1)
        )

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        parts = codes.view(codes.shape[0], -1, 2, 4, 32) << SHIFTS
        return torch.cat((parts.sum(-2, dtype=torch.uint8).flatten(-2), halves(params["scale"])), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        raw = blocks[..., :64].reshape(*blocks.shape[:2], 2, 1, 32)
        return (raw >> SHIFTS & 3).flatten(1), {"scale": from_halves(blocks[..., 64:])}
