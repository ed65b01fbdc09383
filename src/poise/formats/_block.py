"""What the stock blocks of llama.cpp have in common: rows are strings of blocks of fixed bytes.

``pack`` gives exactly the bytes that a GGUF file holds. ``round`` and ``decode`` follow llama.cpp's own
reference decoder, operation by operation in float32, so that every decoded float is the engine's own.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from poise.core.errors import FormatError
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

    def span_of(self, key: str, columns: int) -> int:
        return self.per[key]

    def cover(self, weight: Tensor) -> Params:
        return self.fit(weight)

    def at(self, params: Params, columns: slice) -> Params:
        finest = min(self.per.values())
        first, last = columns.start // finest, -(-columns.stop // finest)
        sliced = {}
        for key, value in params.items():
            share = self.per[key] // finest
            wide = value[:, first // share : -(-last // share)].repeat_interleave(share, dim=1)
            sliced[key] = wide[:, first % share : first % share + last - first]
        return sliced

    def bits_per_weight(self, rows: int, columns: int) -> float:
        return 8 * self.nbytes / self.columns

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``blocks`` uint8 [rows, bytes of a row]."""
        rows, count = codes.shape[0], self.columns_of(codes, params) // self.columns
        if not rows:
            return {"blocks": torch.empty(0, count * self.nbytes, dtype=torch.uint8)}
        return {"blocks": self.to_bytes(codes, params).reshape(rows, count * self.nbytes).contiguous()}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        blocks, count = stored["blocks"], columns // self.columns
        if not len(blocks):
            codes, params = self.from_bytes(torch.zeros(1, count, self.nbytes, dtype=torch.uint8))
            return codes[:0], {key: value[:0] for key, value in params.items()}
        return self.from_bytes(blocks.reshape(len(blocks), count, self.nbytes))

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


FLOOR = 2.0**-16
"""Columns of less importance than this share of the largest count as this much, so that groups of columns without any
weigh equally."""


def relative_importance(importance: Tensor | None, columns: int, span: int) -> Tensor:
    """Importance [columns] relative to the largest of a span of columns, positive; equal where there is none."""
    if importance is None:
        return torch.ones(columns)
    spans = importance.float().view(-1, span)
    largest = spans.amax(1, keepdim=True) if spans.numel() else spans
    return torch.where(largest > 0, spans / largest, 1.0).clamp_(min=FLOOR).flatten()


def to_half(values: Tensor) -> Tensor:
    """Scales as float16.

    Raises:
        FormatError: a value that float16 cannot hold.
    """
    stored = values.to(torch.float16)
    if bool(torch.isinf(stored).any()):
        raise FormatError(
            f"its range needs a scale of {float(values.abs().max()):.3g}, more than the float16 of its blocks holds: "
            "use a format with scale='float32', or keep the weight"
        )
    return stored


def halves(values: Tensor) -> Tensor:
    """float16 [rows, blocks] as little-endian bytes [rows, blocks, 2]."""
    return values.contiguous().view(torch.uint8).view(*values.shape, 2)


def from_halves(raw: Tensor) -> Tensor:
    """Inverse of ``halves``."""
    return raw.contiguous().view(torch.float16).squeeze(-1)


def nibbles(codes: Tensor) -> Tensor:
    """Codes below 16, [..., n], as bytes [..., n / 2]: code j low, code j + n / 2 high."""
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def from_nibbles(raw: Tensor) -> Tensor:
    """Inverse of ``nibbles``."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)
