"""The contract of a solver: (weight, Format, Stats) -> QTensor."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.errors import FormatError
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


class Solver(ABC):
    """Finds codes for a weight. Pure, and deterministic: the same inputs give the same codes."""

    uses_stats: ClassVar[bool] = False
    """Whether statistics of the layer's inputs change the result."""

    @abstractmethod
    def solve_slab(self, weight: Tensor, format: Format, importance: Tensor | None) -> tuple[Tensor, Params]:
        """Codes and parameters of a slab of rows, float32, finite, not empty.

        Args:
            importance: [columns], what a squared error in each column weighs; None for equal.
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
        if weight.shape[1] % format.width:
            raise FormatError(
                f"{name}: rows of {weight.shape[1]} are not a multiple of the format's width {format.width}"
            )
        importance = None if stats is None else stats.second_moment.float()
        if importance is not None and importance.shape[0] != weight.shape[1]:
            raise FormatError(
                f"{name}: {weight.shape[1]} columns, but statistics of {importance.shape[0]} inputs"
            )

        def solve(rows: slice) -> QTensor:
            slab = weight[rows].float()
            if not bool(torch.isfinite(slab.sum())) and not bool(torch.isfinite(slab).all()):
                raise FormatError("holds NaN or infinite weights; the checkpoint is damaged")
            codes, params = self.solve_slab(slab, format, importance)
            return QTensor(codes=codes, params=params, format=format)

        try:
            return _by_slabs(solve, *weight.shape) if format.rows_are_independent else solve(slice(None))
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error


def _by_slabs(solve: Callable[[slice], QTensor], rows: int, columns: int) -> QTensor:
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

    map_slabs(fill, rows, columns)
    return QTensor(codes=whole.pop("codes"), format=whole.pop("format"), params=whole)
