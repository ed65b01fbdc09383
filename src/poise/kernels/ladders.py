"""Ladders of a scalar format's values, sorted, and codes as positions in them."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.core.format import Format, Params
from poise.kernels.places import collect, lean, locate, pick

INSIDE = 0.49
"""How far from a level a place may be that rounds to it, so that float32 leaves no doubt."""


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
        found = torch.empty(index.shape, dtype=self.codes.dtype)
        pick(index.to(torch.uint8).numpy(), self.codes.numpy(), self.group.numpy(), found.numpy())
        return found

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
    values, group = format.ladder(params, rows, columns), torch.arange(columns, dtype=torch.int32)
    codes = alphabet.expand(values.shape)
    if not bool((values[..., 1:] >= values[..., :-1]).all()):  # most are in order, and sorting is slow
        values, order = values.sort(dim=-1, stable=True)
        codes = alphabet[order]
    return Ladders(values.contiguous(), codes.contiguous(), group // format.group_of(columns))


def bits(values: Tensor) -> NDArray[Any]:
    """bfloat16 as its 16 bits, for loops that have no such number; the same memory."""
    array: NDArray[Any] = values.view(torch.int16).numpy().view(np.uint16)
    return array


def places_of(weight: Tensor, ladders: Ladders) -> Tensor:
    """Where weights are, [rows, columns]."""
    place = torch.empty_like(weight)
    locate(weight.numpy(), ladders.values.numpy(), ladders.group.numpy(), place.numpy())
    return place


def begin(weight: Tensor, ladders: Ladders, codes: Tensor, inside: float = INSIDE) -> tuple[Tensor, Tensor]:
    """Places of the weights, and what to add so that each rounds to its given code and is as near to the weight as that
    allows: zero for codes that are the nearest.

    Args:
        inside: how far from a level a place may be that rounds to it, in levels.
    """
    place, index = places_of(weight, ladders), ladders.index_of(codes).float()
    ends = (index == 0, index == ladders.values.shape[2] - 1)  # whatever lies beyond rounds there too
    low = torch.where(ends[0], -torch.inf, index - inside)
    high = torch.where(ends[1], torch.inf, index + inside)
    return place, place.clamp(low, high) - place


class LinearLadders:
    """Ladders as sums of what the linear parameters multiply, so that moving a parameter asks nothing of the format.

    All are in the order of the first ladders: factors are positive, so it stays.
    """

    def __init__(
        self, format: Format, params: Params, ladders: Ladders, keys: tuple[str, ...], columns: int
    ) -> None:
        rows, wide = len(ladders.values), format.group_of(columns)
        self.params, self.group, self.wide = params, ladders.group, wide
        self.entries: dict[str, Tensor] = {}
        self.parts: dict[str, Tensor] = {}
        if not keys:
            return
        order = format.ladder(params, rows, columns).sort(dim=-1, stable=True).indices
        flat = {key: torch.zeros_like(params[key]) for key in format.linear}
        for key in keys:
            one = {**params, **flat, key: torch.ones_like(params[key])}
            self.parts[key] = format.ladder(one, rows, columns).gather(2, order).contiguous()
            starts = torch.arange(0, columns, wide, dtype=torch.int32)
            self.entries[key] = starts // format.span_of(key, columns)

    def moved(self, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters times factors, as they can be stored."""
        new = dict(self.params)
        for key, factor in factors.items():
            old = self.params[key]
            stored = (old.float() * factor).to(old.dtype)
            new[key] = torch.where(torch.isfinite(stored), stored, old)
        return new

    def values(self, params: Params) -> Tensor:
        """Ladders for parameters, [rows, groups, levels]."""
        terms = [
            part * params[key].float()[:, self.entries[key].long()].unsqueeze(-1)
            for key, part in self.parts.items()
        ]
        return sum(terms[1:], terms[0]).contiguous()

    def slope(self, key: str, gradient: Tensor, place: Tensor, index: Tensor) -> Tensor:
        """Gradient for the factors of a parameter."""
        found = torch.zeros(self.params[key].shape)
        entry = self.entries[key][self.group.long()].contiguous()
        arrays = (gradient, place, index, self.parts[key], self.group, entry, found)
        lean(*(array.numpy() for array in arrays))
        return found * self.params[key].float()

    def collected(self, key: str, gradient: Tensor, place: Tensor, rows: slice) -> Tensor:
        """Gradient for a parameter of some rows, for the levels nearest to places; ``gradient`` is bfloat16."""
        found = torch.zeros(self.params[key][rows].shape)
        arrays = (bits(gradient[rows]), place[rows].numpy(), self.parts[key][rows].numpy())
        collect(*arrays, self.wide, self.entries[key].numpy(), found.numpy())
        return found
