"""Tables that are data, not code.

``lattices.safetensors`` holds the points of llama.cpp's lattice blocks, int8 [points, dimensions]: ``iq2_xxs``,
``iq2_xs``, ``iq2_s``, ``iq3_xxs``, ``iq3_s``, and ``iq1`` for both ``iq1_s`` and ``iq1_m``. They are part of the
definition of these formats. Source: llama.cpp, ``ggml-common.h`` (the arrays ``iq*_grid``); licence: MIT, copyright
2023-2026 The ggml authors.
"""

from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


@cache
def lattices() -> dict[str, Tensor]:
    """Points of every lattice; read when first asked for."""
    return load_file(Path(__file__).with_name("lattices.safetensors"))
