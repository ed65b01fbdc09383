"""What the stock blocks of llama.cpp have in common: rows are strings of blocks of fixed bytes.

``pack`` gives exactly the bytes that a GGUF file holds. ``round`` and ``decode`` follow llama.cpp's own
reference decoder, operation by operation in float32, so that every decoded float is the engine's own.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from poise.core.format import Format, Params


class Block(Format):
    """A format whose codes and parameters are stored interleaved, block by block.

    Attributes:
        columns: weights of a block.
        nbytes: bytes of a block.
        group: weights that share a scale.
        per: parameter -> columns that one entry of it stands for.
    """

    columns: ClassVar[int]
    nbytes: ClassVar[int]
    group: ClassVar[int]
    per: ClassVar[Mapping[str, int]]

    @property
    def block(self) -> int:
        return self.columns

    def group_of(self, columns: int) -> int:
        return self.group

    def cover(self, weight: Tensor) -> Params:
        return self.fit(weight)

    def at(self, params: Params, columns: slice) -> Params:
        return {
            key: value[:, columns.start // self.per[key] : -(-columns.stop // self.per[key])]
            for key, value in params.items()
        }

    def bits_per_weight(self, rows: int, columns: int) -> float:
        return 8 * self.nbytes / self.columns

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``blocks`` uint8 [rows, bytes of a row]."""
        rows = codes.shape[0]
        count = self.columns_of(codes, params) // self.columns
        return {"blocks": self.to_bytes(codes, params).reshape(rows, count * self.nbytes).contiguous()}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        blocks = stored["blocks"]
        return self.from_bytes(blocks.reshape(blocks.shape[0], columns // self.columns, self.nbytes))

    @abstractmethod
    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        """uint8 [rows, blocks, nbytes]."""

    @abstractmethod
    def from_bytes(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """Inverse of ``to_bytes``, for any bytes at all."""


def spread(values: Tensor, columns: int) -> Tensor:
    """Parameters [rows, entries] repeated to [rows, columns]; one entry broadcasts without a copy."""
    if values.shape[1] in (1, columns):
        return values
    return values.repeat_interleave(columns // values.shape[1], dim=1)


def halves(values: Tensor) -> Tensor:
    """float16 [..., n] as little-endian bytes [..., 2 n]."""
    return values.to(torch.float16).contiguous().view(torch.uint8)


def from_halves(raw: Tensor) -> Tensor:
    """Inverse of ``halves``."""
    return raw.contiguous().view(torch.float16)
