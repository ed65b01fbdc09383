"""Which GGML type holds a number format, and its bytes: a matter of layout, nothing is rounded here.

The stock blocks of llama.cpp are formats of their own name (``q4_k``, ``iq2_xs``), whose ``pack`` gives their bytes. Other
formats that mean the same are stored in them too: integers with float16 scales in groups of 32, and

    MXFP4   e, 16 bytes of codes j | j + 16 << 4                       2^(e - 127) * v
    NVFP4   4 scales, then for each 16 codes 8 bytes j | j + 8 << 4     e4m3(scale) * v

Byte order inside a block is little-endian throughout.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poise.core.errors import FormatError
from poise.core.format import Format, QTensor
from poise.core.registry import build, name_of, spec_of

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
STOCK = (
    "q1_0", "q2_0", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_s", "iq1_m", "tq1_0", "tq2_0",
)  # fmt: skip
"""Formats whose ``pack`` gives the bytes of the GGML type of the same name."""

Rows = npt.NDArray[np.uint8]
"""Packed rows of a matrix, [rows, bytes of a row]."""


def block_of(format: Format) -> str | None:
    """Name of the GGML type whose blocks hold exactly this format, None when there is none."""
    kind = name_of(format)
    resolved = format.resolve("float16")
    if kind in STOCK or kind == "mxfp4":
        return kind.upper()
    if kind == "float":
        return FLOATS.get(getattr(resolved, "dtype", ""))
    if kind == "nvfp4":  # the scale of the tensor would be a tensor of its own, which few architectures read
        return None if getattr(resolved, "tensor_scale", True) else "NVFP4"
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
    kind = name_of(qtensor.format)
    if kind == "float":
        return pack_floats(qtensor.codes)
    if kind in ("mxfp4", "nvfp4"):
        return _pack_fp4(qtensor.codes, qtensor.params["scale"], 32 if kind == "mxfp4" else 64)
    codes, params = qtensor.codes, qtensor.params
    if kind == "int":
        for key in ("scale", "minimum"):
            if key in params and params[key].dtype != torch.float16:
                raise FormatError(f"{block} blocks hold float16 scales, got {params[key].dtype}")
        if codes.dtype == torch.int8:  # a block's codes start at zero
            codes = codes.view(torch.uint8) + (1 << int(qtensor.format.bits) - 1)
    packed: Rows = build("format", block.lower()).pack(codes, params)["blocks"].numpy()
    return packed


def pack_floats(values: Tensor) -> Rows:
    """Rows of a [rows, columns] float tensor as bytes."""
    return values.contiguous().view(torch.uint8).numpy()


def unpack(rows: Tensor, block: str, columns: int) -> Tensor:
    """Float32 values [rows, columns] of uint8 rows of one of ``STOCK``, for blocks that the gguf package lacks."""
    return QTensor.unpack({"blocks": rows}, build("format", block.lower()), columns).decode()


def known(block: str) -> bool:
    """Whether ``unpack`` decodes these blocks."""
    return block.lower() in STOCK


def _pack_fp4(codes: Tensor, scale: Tensor, columns: int) -> Rows:
    """Scales of a block, then the codes of each of its groups in pairs."""
    rows, groups = scale.shape
    share = columns * groups // codes.shape[1]  # groups of a block
    low, high = codes.view(rows, groups // share, share, 2, -1).unbind(-2)
    parts = (scale.view(rows, -1, share), (low | high << 4).flatten(-2))
    return torch.cat(parts, dim=-1).flatten(1).numpy()
