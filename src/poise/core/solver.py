"""The contract of a solver: (weight, Format, Stats) -> QTensor."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from poise.core.errors import FormatError
from poise.core.format import Format, Params, QTensor

SLAB = 1 << 20
"""Weights handled at once: 4 MB of float32, which stays in the cache of a core. Measured on two cores,
rtn runs 1.0x at 2**22, 1.6x at 2**20 and 1.5x at 2**18 weights a slab."""


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
        step = (
            max(1, SLAB // max(1, weight.shape[1]))
            if format.rows_are_independent
            else max(1, weight.shape[0])
        )
        parts = []
        for start in range(0, max(1, weight.shape[0]), step):
            slab = weight[start : start + step].float()
            if not bool(torch.isfinite(slab.sum())) and not bool(torch.isfinite(slab).all()):
                raise FormatError(f"{name}: holds NaN or infinite weights; the checkpoint is damaged")
            try:
                codes, params = self.solve_slab(slab, format, importance)
            except FormatError as error:
                raise FormatError(f"{name}: {error}") from error
            parts.append(QTensor(codes=codes, params=params, format=format))
        return QTensor.cat(parts)
