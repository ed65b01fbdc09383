"""IQ4_NL of llama.cpp: a fixed non-linear table of 16 levels, 32 weights to a float16 scale (ggml block_iq4_nl)."""

from dataclasses import dataclass

from poise.formats._scaled_block import NibbleBlock

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""ggml kvalues_iq4nl."""


@dataclass(frozen=True, kw_only=True)
class Iq4Nl(NibbleBlock):
    """w = d * LEVELS[q]; d may be negative. 4.5 bits a weight."""

    levels = LEVELS
    tries = (0.6, 11)
