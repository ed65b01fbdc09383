"""GGUF blocks of codes that Poise has found: a matter of layout, nothing is rounded here.

A block holds 32 weights of a row. d and m are float16, q the codes shifted to start at zero:

    Q8_0   d, 32 x int8                                          w = d * q
    Q4_0   d, 16 bytes                                           w = d * (q - 8)
    Q4_1   d, m, 16 bytes                                        w = d * q + m
    Q5_0   d, 32 high bits (little-endian u32), 16 bytes         w = d * (q - 16)
    Q5_1   d, m, 32 high bits, 16 bytes                          w = d * q + m

Byte j of the sixteen holds the low four bits of q[j] and, above them, those of q[j + 16].
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poise.core.errors import FormatError
from poise.core.format import Format, QTensor
from poise.core.registry import name_of, spec_of

GROUP = 32
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
INTEGERS = {
    (8, True): "Q8_0",
    (4, True): "Q4_0",
    (5, True): "Q5_0",
    (4, False): "Q4_1",
    (5, False): "Q5_1",
}
"""(bits, symmetric) -> block."""

Rows = npt.NDArray[np.uint8]
"""Packed rows of a matrix, [rows, bytes of a row]."""


def block_of(format: Format) -> str | None:
    """Name of the GGML type whose blocks hold exactly this format, None when there is none."""
    kind = name_of(format)
    resolved = format.resolve("float16")
    if kind == "float":
        return FLOATS.get(getattr(resolved, "dtype", ""))
    if (
        kind != "int"
        or getattr(resolved, "group", None) != GROUP
        or getattr(resolved, "scale", "") != "float16"
    ):
        return None
    symmetric = bool(getattr(resolved, "symmetric", False))
    if not symmetric and getattr(resolved, "zero", "") != "minimum":
        return None
    return INTEGERS.get((int(resolved.bits), symmetric))


def pack(qtensor: QTensor) -> Rows:
    """Packed rows of a quantized weight.

    Raises:
        FormatError: no block holds this format.
    """
    block = block_of(qtensor.format)
    if block is None:
        raise FormatError(f"llama.cpp has no block for {spec_of(qtensor.format)}")
    if name_of(qtensor.format) == "float":
        return pack_floats(qtensor.codes)
    params = [qtensor.params[key] for key in ("scale", "minimum") if key in qtensor.params]
    if any(param.dtype != torch.float16 for param in params):
        raise FormatError(f"{block} blocks hold float16 scales, got {params[0].dtype}")
    return _pack_integers(qtensor.codes, params, int(qtensor.format.bits))


def pack_floats(values: Tensor) -> Rows:
    """Rows of a [rows, columns] float tensor as bytes."""
    return values.contiguous().view(torch.uint8).numpy()


def _pack_integers(codes: Tensor, params: list[Tensor], bits: int) -> Rows:
    rows, columns = codes.shape
    groups = columns // GROUP
    parts = [param.contiguous().view(torch.uint8).view(rows, groups, 2) for param in params]
    if bits == 8:
        parts.append(codes.contiguous().view(torch.uint8).view(rows, groups, GROUP))
    else:
        parts += _nibbles(codes.view(rows, groups, GROUP), bits)
    return torch.cat(parts, dim=-1).view(rows, -1).numpy()


def _nibbles(codes: Tensor, bits: int) -> list[Tensor]:
    """Bytes of 4- and 5-bit codes: high bits if there are any, then the low ones in pairs."""
    lowest = -(2 ** (bits - 1)) if codes.dtype == torch.int8 else 0
    q = (codes - lowest).view(torch.uint8)
    low = (q[..., : GROUP // 2] & 15) | (q[..., GROUP // 2 :] << 4)
    if bits == 4:
        return [low]
    high = ((q >> 4).long() << torch.arange(GROUP)).sum(-1, keepdim=True)
    return [high.view(torch.uint8)[..., : GROUP // 8], low]
