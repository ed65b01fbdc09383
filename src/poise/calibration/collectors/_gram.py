"""Sums of outer products over any number of tokens, in the memory of one float32 matrix.

Tokens are counted off in chunks of a fixed length, whatever the length of the calls. A chunk's product is one float32
matrix product; chunks are added up in float32. A sum has one rounding a chunk, and a million tokens lose
1.5e-6 of the value (measured on positive inputs, where it is most). How the text was cut into batches does not change a
single bit.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor

from poise.core.squares import add_square, mirror

CHUNK = 2048
"""Tokens of one product. 500 tokens are enough for its speed; more make fewer roundings and wait in memory."""

BLOCK = 512
"""Columns of a product that are added at a time; see ``add_square``."""


class Chunks:
    """Cuts a stream of tensors that have the same number of tokens into chunks."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, ...]] = []
        self._count = 0

    def feed(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Chunks that have become whole, float32."""
        start, total = 0, len(tensors[0])
        while total - start >= CHUNK - self._count:
            stop = start + CHUNK - self._count
            self._waiting.append(tuple(tensor[start:stop].float() for tensor in tensors))
            yield self._joined()
            self._waiting, self._count, start = [], 0, stop
        if start < total:
            self._waiting.append(tuple(tensor[start:].float().clone() for tensor in tensors))
            self._count += total - start

    def rest(self) -> Iterator[tuple[Tensor, ...]]:
        """What waits for a chunk to become whole; it goes on waiting."""
        if self._count:
            yield self._joined()

    def _joined(self) -> tuple[Tensor, ...]:
        if len(self._waiting) == 1:
            return self._waiting[0]
        return tuple(torch.cat(parts) for parts in zip(*self._waiting, strict=True))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T b, for chunks a and b."""
    for start in range(0, total.shape[1], BLOCK):
        total[:, start : start + BLOCK] += a.T @ b[:, start : start + BLOCK]


class Gram:
    """sum_t x_t x_t^T; only the strips on and below the diagonal are kept up to date."""

    def __init__(self, columns: int) -> None:
        self.sum = torch.zeros(columns, columns)

    def add(self, x: Tensor) -> None:
        """A chunk, [tokens, columns] float32."""
        add_square(self.sum, x)

    def plus(self, chunks: Iterator[Tensor]) -> "Gram":
        """A copy with some chunks more."""
        whole = deepcopy(self)
        for x in chunks:
            whole.add(x)
        return whole

    def mean(self, weight: float) -> Tensor:
        """The sum over ``weight``, exactly symmetric; the sum itself is used up."""
        mirror(self.sum)
        return self.sum.div_(weight) if weight else self.sum
