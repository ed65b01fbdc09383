"""The contract of a solver: (weight, Format, Stats) -> QTensor."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.errors import FormatError, UsageError
from poise.core.format import Format, Params, QTensor
from poise.core.slabs import map_slabs


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of the activation that a group of linears reads.

    Attributes:
        second_moment: mean of the squared input, [columns], float32.
        n_tokens: tokens behind it.
        data_hash: hash of the token ids, so that evaluation text can be told apart.
    """

    second_moment: Tensor
    n_tokens: int
    data_hash: str

    def __post_init__(self) -> None:
        if self.second_moment.dim() != 1:
            raise ValueError(f"second_moment must be [columns], got {list(self.second_moment.shape)}")
        if not bool(torch.isfinite(self.second_moment).all()) or bool((self.second_moment < 0).any()):
            raise ValueError("second_moment must be finite and not negative")


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Finds codes for a weight. Pure, and deterministic: the same inputs give the same codes.

    Attributes:
        rounding: ``nearest`` (ties to even), or ``stochastic``: up or down by chance, so that the
            expected value of every weight within the grid's range is the weight itself.
        seed: of the chance; the draw for a weight depends on its place in the matrix alone.
    """

    uses_stats: ClassVar[bool] = False
    """Whether statistics of the layer's inputs change the result."""

    rounding: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "stochastic"):
            raise UsageError(f'rounding is "nearest" or "stochastic", got {self.rounding!r}')

    @abstractmethod
    def solve_slab(
        self, weight: Tensor, format: Format, importance: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Params]:
        """Codes and parameters of a slab of rows, float32, finite.

        Args:
            importance: [columns], what a squared error in each column weighs; None for equal.
            noise: for ``Format.round``; None unless rounding is stochastic.
        """

    def solve(
        self, weight: Tensor, format: Format, stats: Stats | None = None, name: str = "the weight"
    ) -> QTensor:
        """Quantizes a [rows, columns] weight of any floating dtype, slab by slab.

        Raises:
            FormatError: the weight is not a matrix, holds NaN or infinity, or does not fit the format;
                the message names the tensor.
        """
        if weight.dim() != 2 or not weight.is_floating_point():
            raise FormatError(f"{name}: expected a floating matrix, got {weight.dtype} {list(weight.shape)}")
        if (reason := format.misfit(*weight.shape)) is not None:
            raise FormatError(f"{name}: {reason}")
        importance = None if stats is None else stats.second_moment.float()
        if importance is not None and importance.shape[0] != weight.shape[1]:
            raise FormatError(
                f"{name}: {weight.shape[1]} columns, but statistics of {importance.shape[0]} inputs"
            )

        def solve(rows: slice) -> QTensor:
            slab = weight[rows].float()
            if not bool(torch.isfinite(slab.sum())) and not bool(torch.isfinite(slab).all()):
                raise FormatError("holds NaN or infinite weights; the checkpoint is damaged")
            noise = uniform_noise(self.seed, rows, weight) if self.rounding == "stochastic" else None
            codes, params = self.solve_slab(slab, format, importance, noise)
            return QTensor(codes=codes, params=params, format=format)

        try:
            if format.tile_rows:
                return _by_slabs(solve, weight.shape[0], weight.shape[1], format.tile_rows)
            return solve(slice(None))
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error


def uniform_noise(seed: int, rows: slice, weight: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) for some rows of a weight, float32 [rows, columns].

    Counter-based (the finalizer of splitmix64 over place and seed), so that slabs never change a draw.
    """
    first, last, _ = rows.indices(weight.shape[0])
    columns = weight.shape[1]
    z = torch.arange(first * columns, last * columns) + seed * 0x632BE59BD9B4E019 % 2**62
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    z = (z ^ (z >> 31)) & 0xFFFFFF
    return (z.float() / 2**24).view(last - first, columns)


def _by_slabs(solve: Callable[[slice], QTensor], rows: int, columns: int, tile_rows: int) -> QTensor:
    """Solves slab by slab into tensors of the whole matrix, so that no code is in memory twice."""
    lock = Lock()
    whole: dict[str, Any] = {}

    def fill(slab: slice) -> None:
        part = solve(slab)
        with lock:
            if not whole:
                shared = {"codes": part.codes, **part.params}
                whole.update({key: value.new_empty(rows, *value.shape[1:]) for key, value in shared.items()})
                whole["format"] = part.format
        whole["codes"][slab] = part.codes
        for key, value in part.params.items():
            whole[key][slab] = value

    map_slabs(fill, rows, columns, tile_rows)
    return QTensor(codes=whole.pop("codes"), format=whole.pop("format"), params=whole)
