"""The contract of a number format, and the quantized weight it defines."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

Params = Mapping[str, Tensor]
"""What a decoder needs beside the codes: scales, zero points, codebooks."""


class Format(ABC):
    """What a code means.

    A format is a frozen dataclass: equal fields, equal format. All methods are pure.

    Shapes: weights are [rows, columns] float32, finite; codes are [rows, columns] in an integer or
    floating dtype that the format chooses; parameters broadcast over rows and scale groups.

    Attributes:
        bits: of one code, without scales and other metadata.
        width: columns that are rounded together: 1 for scalar grids, 4 or 8 for lattices.
    """

    bits: float
    width: ClassVar[int] = 1

    @abstractmethod
    def group_of(self, columns: int) -> int:
        """Weights of one row that share a scale, for rows of this many columns."""

    @property
    def rows_are_independent(self) -> bool:
        """Whether a slab of rows can be quantized without seeing the others."""
        return True

    @property
    def lopsided(self) -> bool:
        """Whether the levels are not symmetric about zero, so that a mirrored range is another grid."""
        return False

    @abstractmethod
    def fit(self, weight: Tensor, shrink: float = 1.0) -> Params:
        """Parameters that cover the range of each group, the range multiplied by ``shrink`` (0..1].

        A negative ``shrink`` mirrors the grid of a ``lopsided`` format.
        """

    @abstractmethod
    def refit(self, weight: Tensor, codes: Tensor, params: Params, importance: Tensor | None) -> Params:
        """Parameters of smallest squared error for given codes, weighted by [columns] importance.

        A format whose parameters have no closed form returns them unchanged.
        """

    @abstractmethod
    def round(self, weight: Tensor, params: Params) -> Tensor:
        """Codes of the representable values nearest to each weight."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Float32 values of codes, [rows, columns]."""

    @abstractmethod
    def sum_per_scale(self, values: Tensor) -> Tensor:
        """Sums [rows, columns] over the weights of each scale, in the shape of the parameters."""

    @abstractmethod
    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits a weight with all metadata: codes, scales, zero points, padding."""

    @abstractmethod
    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """The tensors that are stored, of exactly ``bits_per_weight`` bits a weight."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        """Inverse of ``pack``: codes [rows, columns] and parameters."""

    def resolve(self, scale_dtype: str) -> "Format":
        """The format with every ``auto`` field settled for a container that stores such scales."""
        return self


@dataclass(frozen=True, kw_only=True)
class QTensor:
    """A quantized weight: ``decode()`` is ``format.decode(codes, params)``.

    Invariants: codes are [rows, columns]; params are what ``format.round`` was given.
    """

    codes: Tensor
    params: Params
    format: Format

    def __post_init__(self) -> None:
        if self.codes.dim() != 2:
            raise ValueError(f"codes must be [rows, columns], got shape {list(self.codes.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def decode(self) -> Tensor:
        """The weight as float32, [rows, columns]."""
        return self.format.decode(self.codes, self.params)

    def __getitem__(self, rows: slice | Tensor) -> "QTensor":
        """Some rows; parameters that all rows share stay as they are."""
        params = {
            key: value[rows] if len(value) == len(self.codes) else value for key, value in self.params.items()
        }
        return QTensor(codes=self.codes[rows], params=params, format=self.format)

    @property
    def bits_per_weight(self) -> float:
        return self.format.bits_per_weight(*self.shape)

    def pack(self) -> dict[str, Tensor]:
        return self.format.pack(self.codes, self.params)

    @classmethod
    def unpack(cls, stored: Mapping[str, Tensor], format: Format, columns: int) -> "QTensor":
        codes, params = format.unpack(stored, columns)
        return cls(codes=codes, params=params, format=format)
