"""TQ1_0 of llama.cpp: ternary, five weights to a byte, 256 to a float16 scale (ggml block_tq1_0)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import from_halves, halves
from poise.formats._scaled_block import ScaledBlock

RUNS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))
"""(first byte, bytes, trits in each): trit n of byte m of a run is code n * bytes + m of the run."""


@dataclass(frozen=True, kw_only=True)
class Tq10(ScaledBlock):
    """w = d * (q - 1), q = 0, 1, 2. 1.6875 bits a weight.

    A byte is a fraction of 256 in base 3, rounded up: multiplying it by 3^n, modulo 256, and then by 3 gives trit n in
    the high byte.
    """

    columns = 256
    nbytes = 54
    group = 256
    per = {"scale": 256}  # noqa: RUF012
    bits = 1.6
    levels = (-1, 0, 1)
    tries = (0.2, 12)

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        blocks = codes.view(codes.shape[0], -1, self.columns).int()
        parts, start = [], 0
        for _, count, trits in RUNS:
            run = blocks[..., start : start + count * trits].view(*blocks.shape[:2], trits, count)
            places = torch.tensor([3 ** (4 - n) for n in range(trits)], dtype=torch.int32).view(-1, 1)
            parts.append((((run * places).sum(-2) * 256 + 242) // 243).to(torch.uint8))
            start += count * trits
        return torch.cat((*parts, halves(params["scale"])), dim=-1)

    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        parts = []
        for first, count, trits in RUNS:
            raw = blocks[..., first : first + count].int().unsqueeze(-2)
            places = torch.tensor([3**n for n in range(trits)], dtype=torch.int32).view(-1, 1)
            parts.append((((raw * places & 255) * 3) >> 8).flatten(-2))
        codes = torch.cat(parts, dim=-1).to(torch.uint8)
        return codes.flatten(1), {"scale": from_halves(blocks[..., 52:])}
