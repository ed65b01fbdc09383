"""Ladders of a scalar format's values, sorted, and codes as positions in them."""

from typing import NamedTuple

import torch
from torch import Tensor

from poise.core.format import Format, Params


class Ladders(NamedTuple):
    """Ascending values of all codes.

    Attributes:
        values: [rows, groups, levels] float32.
        codes: the codes of those values, same shape.
        group: [columns] int32, which of the groups a column is in.
    """

    values: Tensor
    codes: Tensor
    group: Tensor

    def decode(self, index: Tensor) -> Tensor:
        """Codes at positions, [rows, columns]."""
        rows, columns = index.shape
        line = self.group.long().expand(rows, columns)
        return self.codes[torch.arange(rows).unsqueeze(1), line, index.long()]

    def index_of(self, codes: Tensor) -> Tensor:
        """Inverse of ``decode``, uint8; of equal codes the first."""
        rows, columns = codes.shape
        low = int(self.codes.min())
        place = torch.zeros(*self.codes.shape[:2], int(self.codes.max()) - low + 1, dtype=torch.uint8)
        levels = torch.arange(self.codes.shape[2], dtype=torch.uint8).expand(self.codes.shape)
        place.scatter_(2, self.codes.long() - low, levels)
        line = self.group.long().expand(rows, columns)
        return place[torch.arange(rows).unsqueeze(1), line, codes.long() - low]


def ladders_of(format: Format, params: Params, rows: int, columns: int) -> Ladders | None:
    """Of a scalar format; None for others."""
    alphabet = format.alphabet
    if alphabet is None:
        return None
    values, order = format.ladder(params, rows, columns).sort(dim=-1, stable=True)
    group = torch.arange(columns, dtype=torch.int32) // format.group_of(columns)
    return Ladders(values.contiguous(), alphabet[order], group)
