"""The contract of a number format, and the quantized weight it defines."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.errors import UsageError

Params = Mapping[str, Tensor]
"""What a decoder needs beside the codes: scales, zero points, codebooks."""


class Format(ABC):
    """What a code means.

    A format is a frozen dataclass: equal fields, equal format. All methods are pure.

    Shapes: weights are [rows, columns] float32, finite; codes are [rows, columns / width, ...] in an
    integer or floating dtype that the format chooses. Every parameter has one row a weight row, but for
    those in ``shared``.

    Attributes:
        bits: of one weight's code, without scales and other metadata.
        width: columns that are rounded together: 1 for scalar grids, 4 or 8 for lattices, 0 for a whole row.
    """

    bits: float
    width: int = 1

    @property
    def block(self) -> int:
        """Columns that a row must be a multiple of."""
        return max(1, self.width)

    @property
    def tile_rows(self) -> int:
        """Rows that must be quantized together: 1 when rows are independent, 0 for all of the matrix."""
        return 1

    @property
    def shared(self) -> frozenset[str]:
        """Names of parameters that all rows share: scales of a tensor, codebooks."""
        return frozenset()

    @property
    def alphabet(self) -> Tensor | None:
        """Every code of a scalar format, [levels], in the dtype of the codes; None if a code has no value of its own.

        With it come the compiled error feedback and coordinate descent; without it solvers go through ``round``.
        """
        return None

    @property
    def linear(self) -> tuple[str, ...]:
        """Names of real parameters, [rows, entries], in which ``decode`` is linear for given codes.

        They are refitted in closed form and tuned by gradients. Parameters that rows share are not among them.
        """
        return ()

    def span_of(self, key: str, columns: int) -> int:
        """Columns that an entry of a linear parameter stands for; the last entry may stand for fewer."""
        return self.group_of(columns)

    @abstractmethod
    def group_of(self, columns: int) -> int:
        """Weights of one row that share a scale, for rows of this many columns."""

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a matrix of this shape cannot have this format, or None. Nothing is ever padded silently."""
        if columns % self.block == 0:
            return None
        from poise.core.registry import fitting_formats, name_of

        others = fitting_formats(columns, self.bits)
        return (
            f"rows of {columns} are not a multiple of the block of {self.block} of {name_of(self)}; "
            f"formats near {self.bits:g} bits that fit: {', '.join(others)}"
        )

    @abstractmethod
    def cover(self, weight: Tensor) -> Params:
        """Parameters that reach the largest weight of every group: no data, no search.

        Formats without such a notion answer with ``fit``.
        """

    @abstractmethod
    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        """Parameters of least squared error of ``round``, as far as the format's own search finds them.

        Args:
            importance: [columns], what a squared error in each column weighs; None for equal. Where a
                group has none at all, its columns weigh equally.
        """

    @abstractmethod
    def at(self, params: Params, columns: slice) -> Params:
        """Parameters of a slab of columns, for ``round`` and ``decode`` of that slab alone.

        The slab begins and ends at multiples of ``width`` and lies inside one group, or holds whole groups.
        """

    @abstractmethod
    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Codes of the representable values nearest to the weights.

        Args:
            importance: [columns], the metric of "nearest" where columns are rounded together; scalar
                formats need none.
            noise: [rows, columns] uniform in [0, 1) for stochastic rounding: a weight between two values
                becomes either, so that its expectation is the weight. Ties and all else are unchanged.

        Raises:
            UsageError: noise for a format that is not scalar.
        """

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Float32 values of codes, [rows, columns]."""

    @abstractmethod
    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits a weight with all metadata: codes, scales, zero points, codebooks, padding."""

    @abstractmethod
    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """The tensors that are stored, of exactly ``bits_per_weight`` bits a weight."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        """Inverse of ``pack``: codes and parameters."""

    def ladder(self, params: Params, rows: int, columns: int) -> Tensor:
        """Values of the alphabet in every group of a matrix, float32 [rows, groups, levels]."""
        alphabet = self.alphabet
        assert alphabet is not None  # asked of scalar formats alone
        n = self.group_of(columns)
        values = []
        for start in range(0, columns, n):
            run = slice(start, min(start + n, columns))
            width, part = run.stop - run.start, self.at(params, run)
            steps = [
                self.decode(_padded(alphabet[k : k + width], width).expand(rows, width).contiguous(), part)
                for k in range(0, len(alphabet), width)
            ]
            values.append(torch.cat(steps, dim=1)[:, : len(alphabet)])
        return torch.stack(values, dim=1)

    def basis(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """What an entry of each linear parameter multiplies, [rows, columns]: decoded weights are their sum."""
        flat = {key: torch.zeros_like(params[key]) for key in self.linear}
        return {
            key: self.decode(codes, {**params, **flat, key: torch.ones_like(params[key])})
            for key in self.linear
        }

    def resolve(self, scale_dtype: str) -> "Format":
        """The format with every ``auto`` field settled for a container that stores such scales."""
        return self

    def descend(
        self, weight: Tensor, codes: Tensor, params: Params, hessian: Tensor, rounds: int
    ) -> tuple[Tensor, Params]:
        """Codes and parameters of a smaller tr (W - W') H (W - W')^T, for formats that round whole rows; never of a larger one.

        Others are refined by solvers, which know their columns.

        Args:
            hessian: float32 [columns, columns], positive definite.
            rounds: at most.
        """
        return codes, params

    def refuse_noise(self, noise: Tensor | None) -> None:
        """For formats that round several columns together, where chance has no two neighbours to choose from.

        Raises:
            UsageError: there is noise.
        """
        if noise is not None:
            from poise.core.registry import name_of

            raise UsageError(
                f"{name_of(self)} is not scalar: stochastic rounding is for scalar formats, use rounding='nearest'"
            )

    def columns_of(self, codes: Tensor, params: Params) -> int:
        """Columns of the weight that these codes stand for."""
        return codes.shape[1] * self.width


def _padded(codes: Tensor, width: int) -> Tensor:
    """Codes repeated to this many."""
    return codes.repeat(-(-width // len(codes)))[:width]


@dataclass(frozen=True, kw_only=True)
class QTensor:
    """A quantized weight: ``decode()`` is ``format.decode(codes, params)``.

    Invariants: codes are [rows, positions, ...]; params are what ``format.round`` was given.
    """

    codes: Tensor
    params: Params
    format: Format

    def __post_init__(self) -> None:
        if self.codes.dim() < 2:
            raise ValueError(f"codes must be [rows, positions], got shape {list(self.codes.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.format.columns_of(self.codes, self.params)

    def decode(self) -> Tensor:
        """The weight as float32, [rows, columns]."""
        return self.format.decode(self.codes, self.params)

    def __getitem__(self, rows: slice | Tensor) -> "QTensor":
        """Some rows; parameters that all rows share stay as they are."""
        shared = self.format.shared
        params = {key: value if key in shared else value[rows] for key, value in self.params.items()}
        return QTensor(codes=self.codes[rows], params=params, format=self.format)

    @classmethod
    def stack(cls, parts: Sequence["QTensor"]) -> "QTensor":
        """Runs of rows, one above the other; all have the same format and shared parameters."""
        first, shared = parts[0], parts[0].format.shared
        params = {
            key: value if key in shared else torch.cat([part.params[key] for part in parts])
            for key, value in first.params.items()
        }
        return cls(codes=torch.cat([part.codes for part in parts]), params=params, format=first.format)

    @property
    def bits_per_weight(self) -> float:
        return self.format.bits_per_weight(*self.shape)

    def pack(self) -> dict[str, Tensor]:
        return self.format.pack(self.codes, self.params)

    @classmethod
    def unpack(cls, stored: Mapping[str, Tensor], format: Format, columns: int) -> "QTensor":
        codes, params = format.unpack(stored, columns)
        return cls(codes=codes, params=params, format=format)


@dataclass(frozen=True, kw_only=True)
class FormatFacts:
    """One row of the table of formats.

    Attributes:
        bits_per_weight: with all metadata, of a [4096, 4096] weight with 16-bit scales.
        group: weights of a row that share a scale.
        width: columns rounded together; 0 for a whole row.
        gaussian, heavy: signal-to-noise ratio in dB of ``search`` without importance on normal weights, and on weights of
            Student's t with 5 degrees of freedom; None when it was not measured.
        exporters: exporter -> yes, or no and the reason.
    """

    spec: str
    name: str
    bits_per_weight: float
    group: int
    width: int
    gaussian: float | None
    heavy: float | None
    exporters: dict[str, str]
