"""Which weights share a scale: runs of a row, a whole row, blocks of rows and columns, or the whole matrix.

A group is a number of columns, ``"channel"`` (a row), ``"128x128"`` (rows x columns, any two numbers) or
``"tensor"``. Parameters are [rows, groups], for a tensor [1, 1]. Those of two-dimensional blocks are repeated for
every row of their block, so that a row carries its own; what is stored (``kept``) has them once.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.core.format import Params
from poise.formats._search import extremes

Group = int | str


@dataclass(frozen=True)
class Groups:
    """One way to share scales.

    Raises:
        UsageError: not a group.
    """

    group: Group

    def __post_init__(self) -> None:
        if isinstance(self.group, bool) or (isinstance(self.group, int) and not 16 <= self.group <= 256):
            raise UsageError(f'group is 16 to 256, got {self.group!r}; or "channel", "tensor", "128x128"')
        if isinstance(self.group, str) and self.group not in ("channel", "tensor") and not self._sides:
            raise UsageError(f'group is 16 to 256, "channel", "tensor" or "128x128", got {self.group!r}')

    @property
    def _sides(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", str(self.group))
        return (int(found[1]), int(found[2])) if found else None

    @property
    def whole(self) -> bool:
        """Whether one scale serves the matrix."""
        return self.group == "tensor"

    @property
    def rows(self) -> int:
        """Rows of a group; 0 for all."""
        return 0 if self.whole else self._sides[0] if self._sides else 1

    def of(self, columns: int) -> int:
        """Columns of a group, in rows of this many."""
        wanted = self.group if isinstance(self.group, int) else self._sides[1] if self._sides else columns
        return max(1, min(wanted, columns))

    def count(self, columns: int) -> int:
        """Groups along a row."""
        return -(-columns // self.of(columns))

    def stored(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of what is stored of a parameter."""
        return (1, 1) if self.whole else (-(-rows // self.rows), self.count(columns))

    def view(self, weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """(x, importance, n) as ``_search`` takes them: groups are runs of n columns of x.

        Blocks are laid out one a row; what they lack at the edges is zeros of no importance.
        """
        rows, columns = weight.shape
        given = torch.ones(columns) if importance is None else importance.float()
        n = self.of(columns)
        if self.whole:
            spread = given.expand(rows, columns).reshape(1, -1)
            return weight.reshape(1, -1), spread, max(1, weight.numel())
        if self.rows == 1:
            return weight.contiguous(), given.view(1, -1).contiguous(), n
        missing = (0, -columns % n, 0, -rows % self.rows)
        blocks = [
            torch.nn.functional.pad(part, missing)
            .view(-1, self.rows, self.count(columns), n)
            .transpose(1, 2)
            .reshape(-1, self.rows * n)
            for part in (weight, given.expand(rows, columns))
        ]
        return blocks[0], blocks[1], self.rows * n

    def unview(self, values: Tensor, rows: int, columns: int) -> Tensor:
        """Parameters of the groups of ``view`` as [rows, groups] (or [1, 1], for a tensor)."""
        if self.rows <= 1:
            return values
        return values.view(-1, self.count(columns)).repeat_interleave(self.rows, dim=0)[:rows]

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of every group, in the shape of the parameters."""
        rows, columns = weight.shape
        if not weight.numel():
            empty = weight.new_zeros(1 if self.whole else rows, self.count(columns))
            return empty, empty
        if self.whole:
            low, high = torch.aminmax(weight)
            return low.view(1, 1), high.view(1, 1)
        low, high = ranges(weight.contiguous(), self.of(columns))
        if self.rows == 1:
            return low, high
        padded = [torch.cat((part, part[-1:].expand(-rows % self.rows, -1))) for part in (low, high)]
        low, high = (part.view(-1, self.rows, part.shape[1]) for part in padded)
        return self.unview(low.amin(1), rows, columns), self.unview(high.amax(1), rows, columns)

    def spread(self, values: Tensor, columns: int) -> Tensor:
        """Parameters repeated over the columns of their group, without a copy if possible."""
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self.of(columns), dim=1)[:, :columns]

    def at(self, values: Tensor, columns: slice) -> Tensor:
        """Parameters of a slab of columns."""
        if values.shape[1] == 1:
            return values
        n = self.of(columns.stop)
        return values[:, columns.start // n : -(-columns.stop // n)]

    def kept(self, values: Tensor) -> Tensor:
        """Each block's parameters once."""
        return values[:: self.rows].contiguous() if self.rows > 1 else values

    def unkept(self, params: Params, rows: int) -> Params:
        """Inverse of ``kept`` for several parameters."""
        if self.rows <= 1:
            return params
        return {key: value.repeat_interleave(self.rows, dim=0)[:rows] for key, value in params.items()}


def ranges(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of runs of n columns, [rows, runs]; the last run may be shorter."""
    low, high = extremes(x.numpy(), n)
    return torch.from_numpy(low), torch.from_numpy(high)
