"""The contract of a transform: it rewrites weights before they are rounded and leaves the function as it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from poise.core.format import Format
from poise.core.stats import Stats
from poise.core.topology import Topology

KINDS = ("rows", "columns", "left", "right", "add", "set")


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """One operation on one tensor, as a matrix [rows, columns]; a vector is a matrix of one column.

    Attributes:
        name: of the tensor.
        kind: ``rows`` and ``columns`` multiply by a vector; ``left`` multiplies runs of rows by the transpose of an
            orthogonal matrix, ``right`` runs of columns by the matrix itself; ``add`` adds, ``set`` replaces.
        value: the vector or matrix, float64.
    """

    name: str
    kind: str
    value: Tensor

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: no rewriting {self.kind!r}, one of {KINDS}")

    def apply(self, weight: Tensor) -> Tensor:
        """The rewritten matrix, in the dtype of the given one."""
        value = self.value.to(weight.dtype)
        rows, columns = weight.shape
        match self.kind:
            case "rows":
                return weight * value.unsqueeze(1)
            case "columns":
                return weight * value
            case "left":
                return (value.T @ weight.reshape(-1, len(value), columns)).reshape(rows, columns)
            case "right":
                return (weight.reshape(rows, -1, len(value)) @ value).reshape(rows, columns)
            case "add":
                return weight + value.reshape(rows, columns)
        return value.reshape(rows, columns)


Read = Callable[[str], Tensor]
"""Name of a tensor -> its matrix, float32 [rows, columns], as it is before this transform."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a transform works on: the whole model, or one block of it.

    Attributes:
        topology: of the model; of a block alone what belongs to it.
        read: gives matrices.
        formats: name of a matrix -> the format that it is planned in; kept ones are missing.
        stats: name of a matrix -> what is known of its inputs; empty where the transform needs nothing.
        rounded: name of a matrix -> itself as it was rounded, and what is known of what it then reads; for transforms
            that come after rounding.
    """

    topology: Topology
    read: Read
    formats: Mapping[str, Format]
    stats: Mapping[str, Stats]
    rounded: Mapping[str, tuple[Tensor, Stats]] = field(default_factory=dict)


class Transform(ABC):
    """Rewrites weights offline: any runtime runs the result. Deterministic; random ones take a seed."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``Stats`` without which it cannot work; those that need some are called block by block."""

    tokens: ClassVar[int | None] = None
    """Of calibration text that it looks at; None for all."""

    after: ClassVar[bool] = False
    """Whether it comes after rounding and mends what that did; without rounding it changes nothing."""

    unties: ClassVar[bool] = False
    """Whether it gives the head a tensor of its own."""

    @abstractmethod
    def refuses(self, topology: Topology) -> str | None:
        """Why it cannot be used on this model, or None."""

    @abstractmethod
    def rewrites(self, material: Material) -> Sequence[Rewrite]:
        """What is done to which tensor, in this order."""
