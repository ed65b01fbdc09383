"""The contract of a solver: (weight, Format, Stats) -> QTensor."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.errors import FormatError, UsageError
from poise.core.format import Format, Params, QTensor
from poise.core.slabs import map_slabs
from poise.core.stats import Stats


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Finds codes for a weight. Pure, and deterministic: the same inputs give the same codes.

    Attributes:
        rounding: ``nearest`` (ties to even), or ``stochastic``: up or down by chance, so that the
            expected value of every weight within the grid's range is the weight itself.
        seed: of the chance; the draw for a weight depends on its place in the matrix alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Names of the ``Stats`` that change the result."""
    slab_rows: ClassVar[int] = 1
    """Rows that a slab has at least, if every slab reads anew what all share."""

    rounding: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "stochastic"):
            raise UsageError(f'rounding is "nearest" or "stochastic", got {self.rounding!r}')

    @property
    def wants(self) -> frozenset[str]:
        """Names of the ``Stats`` that this very solver uses: ``needs``, unless its fields say otherwise."""
        return self.needs

    def target(self, weight: Tensor, format: Format, stats: Stats | None) -> Tensor:
        """The real weight that codes should come near to, [rows, columns]."""
        return weight

    def prepare(self, weight: Tensor, format: Format, stats: Stats | None) -> Any:
        """What all slabs of a matrix share; the importance of columns, [columns] or None, unless overridden."""
        return None if stats is None else stats.second_moment.float()

    @abstractmethod
    def solve_slab(
        self, weight: Tensor, format: Format, shared: Any, start: QTensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Params]:
        """Codes and parameters of a slab of rows, float32, finite.

        Args:
            shared: what ``prepare`` made.
            start: codes to begin from; a solver that begins afresh ignores them.
            noise: for ``Format.round``; None unless rounding is stochastic.
        """

    def solve(
        self,
        weight: Tensor,
        format: Format,
        stats: Stats | None = None,
        name: str = "the weight",
        start: QTensor | None = None,
    ) -> QTensor:
        """Quantizes a [rows, columns] weight of any floating dtype, slab by slab.

        Args:
            start: codes and parameters of the same format, from a solver before.

        Raises:
            FormatError: the weight is not a matrix, holds NaN or infinity, or does not fit the format;
                the message names the tensor.
        """
        if weight.dim() != 2 or not weight.is_floating_point():
            raise FormatError(f"{name}: expected a floating matrix, got {weight.dtype} {list(weight.shape)}")
        if (reason := format.misfit(*weight.shape)) is not None:
            raise FormatError(f"{name}: {reason}")
        if stats is not None and stats.second_moment.shape[0] != weight.shape[1]:
            raise FormatError(
                f"{name}: {weight.shape[1]} columns, but statistics of {stats.second_moment.shape[0]} inputs"
            )
        try:
            parts = [
                self._solve_run(weight[rows], format, known, None if start is None else start[rows])
                for rows, known in _runs(len(weight), format, stats)
            ]
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error
        return parts[0] if len(parts) == 1 else QTensor.stack(parts)

    def aim(self, weight: Tensor, format: Format, stats: Stats | None) -> Tensor:
        """What ``solve`` wants codes to come near to, [rows, columns]: ``target``, run by run of rows."""
        parts = [
            self.target(weight[rows], format, known) for rows, known in _runs(len(weight), format, stats)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _solve_run(
        self, weight: Tensor, format: Format, stats: Stats | None, start: QTensor | None
    ) -> QTensor:
        """Rows that have one Hessian."""
        return self._attain(self.target(weight, format, stats), format, stats, start)

    def _attain(self, weight: Tensor, format: Format, stats: Stats | None, start: QTensor | None) -> QTensor:
        """Codes for a target."""
        shared = self.prepare(weight, format, stats)

        def solve(rows: slice) -> QTensor:
            slab = weight[rows].float()
            if not bool(torch.isfinite(slab.sum())) and not bool(torch.isfinite(slab).all()):
                raise FormatError("holds NaN or infinite weights; the checkpoint is damaged")
            noise = uniform_noise(self.seed, rows, weight) if self.rounding == "stochastic" else None
            codes, params = self.solve_slab(
                slab, format, shared, None if start is None else start[rows], noise
            )
            return QTensor(codes=codes, params=params, format=format)

        if tile := format.tile_rows:
            least = tile * math.ceil(self.slab_rows / tile)
            return _by_slabs(solve, weight.shape[0], weight.shape[1], least)
        return solve(slice(None))


@dataclass(frozen=True, kw_only=True)
class Chain(Solver):
    """Solvers one after the other, ``gptaq -> refine``: each begins from the codes of the one before, and aims where
    that one aimed."""

    steps: tuple[Solver, ...]

    @property
    def wants(self) -> frozenset[str]:
        return frozenset().union(*(step.wants for step in self.steps))

    def target(self, weight: Tensor, format: Format, stats: Stats | None) -> Tensor:
        for step in self.steps:
            weight = step.target(weight, format, stats)
        return weight

    def solve_slab(
        self, weight: Tensor, format: Format, shared: Any, start: QTensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Params]:
        raise NotImplementedError("a chain solves whole matrices")

    def _solve_run(
        self, weight: Tensor, format: Format, stats: Stats | None, start: QTensor | None
    ) -> QTensor:
        for step in self.steps:
            weight = step.target(weight, format, stats)
            start = step._attain(weight, format, stats, start)
        assert start is not None  # a chain has steps
        return start


def _runs(rows: int, format: Format, stats: Stats | None) -> list[tuple[slice, Stats | None]]:
    """Runs of rows, each with the statistics that are its own."""
    if stats is None:
        return [(slice(0, rows), None)]
    runs = stats.runs if format.tile_rows else 1
    edges = [rows * run // runs for run in range(runs + 1)]
    return [(slice(*edge), stats.of_run(run)) for run, edge in enumerate(pairwise(edges))]


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
