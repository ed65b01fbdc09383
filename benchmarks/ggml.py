"""llama.cpp's own block encoders and decoders, called in the library that the engine's package carries."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poise.layouts.gguf_header import type_number, type_size

Blocks = npt.NDArray[np.uint8]
"""Packed rows, [rows, bytes of a row]."""


class Ggml:
    """Encodes and decodes rows as llama.cpp does; None of it is Poise's code.

    Raises:
        FileNotFoundError: the package ``xllamacpp`` is not installed.
    """

    def __init__(self) -> None:
        spec = find_spec("xllamacpp")
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                "llama.cpp's encoders are in the package xllamacpp: pip install -e '.[llamacpp]'"
            )
        self._library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        self._library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, pointer, pointer, integer, integer, integer, pointer,
        ]  # fmt: skip

    def needs_importance(self, block: str) -> bool:
        return bool(self._library.ggml_quantize_requires_imatrix(type_number(block)))

    def encode(
        self, block: str, weight: Tensor, importance: Tensor | None = None, threads: int = 1
    ) -> Blocks:
        """Blocks of a contiguous float32 [rows, columns] weight; each thread takes a run of rows."""
        length, nbytes = type_size(block)
        rows, columns = weight.shape
        out = np.zeros((rows, columns // length * nbytes), dtype=np.uint8)
        if importance is None and self.needs_importance(block):
            importance = torch.ones(columns)
        given = None if importance is None else importance.data_ptr()
        number = type_number(block)
        self._library.ggml_quantize_init(number)  # tables of the lattices, once

        def run(part: npt.NDArray[np.int64]) -> None:
            first, count = int(part[0]), len(part)
            arguments = (weight.data_ptr(), out.ctypes.data, first * columns, count, columns, given)
            self._library.ggml_quantize_chunk(number, *arguments)

        parts = [part for part in np.array_split(np.arange(rows), threads) if len(part)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, parts))
        return out

    def decode(self, block: str, rows: Blocks, columns: int) -> Tensor:
        """Float32 [rows, columns] of blocks."""
        rows = np.ascontiguousarray(rows)
        out = torch.zeros(len(rows), columns)
        decoder = getattr(self._library, f"dequantize_row_{block.lower().replace('_k', '_K')}")
        decoder(
            ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.numel())
        )
        return out
