"""One matrix: its codes, and what they came to."""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from poise.core.errors import PoiseWarning
from poise.core.format import Format, QTensor
from poise.core.plan import PlanRow
from poise.core.registry import build
from poise.core.slabs import map_slabs
from poise.core.solver import Solver
from poise.core.squares import energy
from poise.core.stats import Stats

JUDGED = 256
"""Rows of a matrix whose outputs tell what it lost: a matrix's rows number hundreds to ten thousands, and are much alike."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What solving one matrix came to.

    Attributes:
        weight_error: |W - W'|^2 / |W|^2.
        output_error: E|(V - W') x|^2 / E|V x|^2 under the statistics there were, V what the solver aimed at: W, and what
            it adds to make up for layers before. Of no more than ``JUDGED`` rows, evenly spread, where rows are on their
            own. NaN without statistics.
        nearest: the same for V rounded to nearest.
        tokens: behind the statistics, 0 without any.
        warnings: what was mended or is doubtful.
    """

    name: str
    format: str
    solver: str
    seconds: float
    weight_error: float
    output_error: float
    nearest: float
    tokens: int
    warnings: tuple[str, ...] = ()


def solve_matrix(
    weight: Tensor, row: PlanRow, solver: Solver, format: Format, stats: Stats | None
) -> tuple[QTensor, Outcome]:
    """Codes of a matrix, and what they came to."""
    start = time.perf_counter()
    said = [] if stats is None else list(stats.notes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PoiseWarning)
        found = solver.solve(weight, format, stats, name=row.name)
    said += [str(item.message) for item in caught if issubclass(item.category, PoiseWarning)]
    seconds = time.perf_counter() - start
    (weight_error,) = relative_errors(weight, [found], None)
    output_error = nearest_error = math.nan
    if stats is not None:
        rows = _judged(len(weight), format, stats)
        aim = solver.aim(weight, format, stats)[rows]
        nearest = build("solver", "rtn").solve(aim, format, name=row.name)
        output_error, nearest_error = relative_errors(aim, [found[rows], nearest], stats)
    outcome = Outcome(
        name=row.name,
        format=str(row.format),
        solver=str(row.solver),
        seconds=round(seconds, 3),
        weight_error=weight_error,
        output_error=output_error,
        nearest=nearest_error,
        tokens=stats.n_tokens if stats is not None else 0,
        warnings=tuple(dict.fromkeys(said)),
    )
    return found, outcome


def _judged(rows: int, format: Format, stats: Stats) -> slice:
    """Rows whose outputs are judged: all products with a Hessian would take as long as error feedback does.

    All of them where rows hang together, or have Hessians of their own.
    """
    alone = (
        format.tile_rows == 1 and not format.shared and (stats.hessian is None or stats.hessian.dim() == 2)
    )
    return slice(None, None, math.ceil(rows / JUDGED) if alone and rows else 1)


def relative_errors(weight: Tensor, found: Sequence[QTensor], stats: Stats | None) -> list[float]:
    """tr (W - W') H (W - W')^T / tr W H W^T of some W', with the Hessian, or the diagonal of it that is known, or without."""
    moment = None if stats is None else stats.second_moment
    hessian = None if stats is None else stats.hessian

    def part(rows: slice) -> list[float]:
        w = weight[rows].float()
        lost = [w - one[rows].decode() for one in found]
        if hessian is None:
            weigh = 1.0 if moment is None else moment
            return [float((each.square() * weigh).sum()) for each in (w, *lost)]
        h = hessian
        if h.dim() == 3:
            h = h[min(len(h) - 1, (rows.start or 0) * len(h) // len(weight))]
        return [energy(each, h) for each in (w, *lost)]

    whole, *errors = (math.fsum(each) for each in zip(*map_slabs(part, *weight.shape), strict=True))
    return [error / whole if whole else 0.0 for error in errors]
