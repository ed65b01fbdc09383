"""Q4_0 of llama.cpp: 4-bit integers, 32 to a float16 scale (ggml block_q4_0)."""

from dataclasses import dataclass

from poise.formats._scaled_block import NibbleBlock


@dataclass(frozen=True, kw_only=True)
class Q40(NibbleBlock):
    """w = d * (q - 8), q = 0..15; d may be negative. 4.5 bits a weight."""

    levels = tuple(range(-8, 8))
    tries = (0.6, 11)
