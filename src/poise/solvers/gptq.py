"""Error feedback: what one column loses, the columns after it make up for (GPTQ, block LDLQ)."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from poise.core.errors import FormatError, UsageError
from poise.core.format import Format, Params, QTensor
from poise.core.registry import spec_of
from poise.core.solver import Solver
from poise.core.stats import Stats
from poise.kernels.ladders import Ladders, ladders_of
from poise.solvers._hessian import Factor, damped, factorize
from poise.solvers._majorize import majorize
from poise.solvers._sweep import sweep

Shared = tuple[Tensor | None, Factor | Tensor | None]
"""Importance of columns, and the factor of the Hessian; the Hessian itself for formats that round whole rows."""
STEPS = 3
"""Of descent for formats that round whole rows; ``refine`` goes on from there."""


@dataclass(frozen=True, kw_only=True)
class Gptq(Solver):
    """Minimises tr (W - W') H (W - W')^T greedily, column by column, with H = E[x x^T] of the layer's inputs.

    For columns in turn: q = Q(w_j), e = (w_j - q) / U_jj, w_i -= e U_ji for the columns i after j, where
    H^-1 = U^T U (Frantar et al. 2022, arXiv 2210.17323, equations 2 and 3). Formats that round v columns together
    take e = (w_B - q) U_BB^-1, the block LDLQ of QuIP# (Tseng et al. 2024, arXiv 2402.04396, section 4.1), with the
    diagonal of what the metric of the block is by then as the importance.

    Deviations from GPTQ: parameters are fitted before the sweep, weighed by the second moments, so that the order of
    the columns is free for every group; the factor is computed in float64; dead columns keep their weight.

    Without a Hessian this is ``search``.

    Attributes:
        act_order: whether columns of large inputs come first.
        groups: ``static``: parameters are fitted to the original weight; ``refit``: to what the sweep has made of it
            when it comes to a group, which keeps columns in their order.
        damp: added to the diagonal of H, as a share of its mean.
        panel: columns between two updates of all that follow; codes do not depend on it but for rounding errors.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment", "hessian"})

    act_order: bool = True
    groups: str = "static"
    damp: float = 0.01
    panel: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups not in ("static", "refit"):
            raise UsageError(f'groups is "static" or "refit", got {self.groups!r}')
        if self.groups == "refit" and self.act_order:
            raise UsageError('groups="refit" goes through columns in their order: set act_order=False')
        if not 0 <= self.damp <= 1 or self.panel < 1:
            raise UsageError("damp is between 0 and 1, panel at least 1")

    def prepare(self, weight: Tensor, format: Format, stats: Stats | None) -> Shared:
        if stats is None:
            return None, None
        moment = stats.second_moment.float()
        if stats.hessian is None:
            return moment, None
        if format.width == 0:
            return moment, damped(stats.hessian.float(), self.damp)
        return moment, self.factor(format, stats)

    def factor(self, format: Format, stats: Stats) -> Factor:
        """Of the Hessian, made once for all weights that read the same input."""
        hessian, width = stats.hessian, max(1, format.width)
        assert hessian is not None  # it was looked for
        return cast(
            Factor,
            stats.derive(
                (self.damp, width, self.act_order),
                lambda: factorize(hessian, damp=self.damp, width=width, act_order=self.act_order),
            ),
        )

    def solve_slab(
        self, weight: Tensor, format: Format, shared: Any, start: QTensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Params]:
        importance, factor = shared
        if isinstance(factor, Factor) and self.groups == "refit" and weight.numel():
            return self._refitted(weight, format, importance, factor)
        params = format.fit(weight, importance)
        if factor is None or not weight.numel():
            return format.round(weight, params, importance, noise), params
        if isinstance(factor, Tensor):
            return majorize(weight, format, format.round(weight, params, importance), params, factor, STEPS)
        ladders = ladders_of(format, params, *weight.shape) if noise is None else None
        if ladders is None:
            return feed_back(weight, format, params, factor, noise), params
        work = weight[:, factor.order].contiguous()
        index = self._sweep(work, ladders._replace(group=ladders.group[factor.order]), factor, 0)
        back = torch.empty_like(index)
        back[:, factor.order] = index
        return ladders.decode(back), params

    def _sweep(self, work: Tensor, ladders: Ladders, factor: Factor, start: int) -> Tensor:
        """Positions in the ladders of the columns from ``start`` on; ``work`` beyond them takes their errors."""
        rows, n = work.shape
        stop = start + len(ladders.group)
        values, group = (
            ladders.values.permute(1, 2, 0).contiguous().numpy(),
            ladders.group.contiguous().numpy(),
        )
        index = torch.empty(rows, stop - start, dtype=torch.uint8)
        for first in range(start, stop, self.panel):
            last = min(first + self.panel, stop)
            panel = work[:, first:last].contiguous()
            error, part = torch.empty_like(panel), torch.empty(rows, last - first, dtype=torch.uint8)
            upper = factor.upper[first:last]
            corner = upper[:, first:last].contiguous().numpy()
            runs = group[first - start : last - start]
            sweep(panel.numpy(), corner, values, runs, part.numpy(), error.numpy())
            index[:, first - start : last - start] = part
            if last < n:
                work[:, last:].addmm_(error, upper[:, last:], alpha=-1)
        return index

    def _refitted(
        self, weight: Tensor, format: Format, importance: Tensor | None, factor: Factor
    ) -> tuple[Tensor, Params]:
        """Parameters of every run of groups from what the sweep has made of it."""
        rows, n = weight.shape
        run = max(format.block, format.group_of(n))
        if format.alphabet is None or format.tile_rows != 1 or n % run:
            raise FormatError(
                f'groups="refit" is for scalar formats whose groups divide a row; use groups="static" for {spec_of(format)}'
            )
        work, codes, params = weight.clone(), [], []
        for first in range(0, n, run):
            place = slice(first, first + run)
            weigh = None if importance is None else importance[place]
            part = format.fit(work[:, place].contiguous(), weigh)
            ladders = ladders_of(format, part, rows, run)
            assert ladders is not None  # it has an alphabet
            codes.append(ladders.decode(self._sweep(work, ladders, factor, first)))
            params.append(part)
        joined = {key: torch.cat([part[key] for part in params], dim=1) for key in params[0]}
        return torch.cat(codes, dim=1), joined


def feed_back(weight: Tensor, format: Format, params: Params, factor: Factor, noise: Tensor | None) -> Tensor:
    """Error feedback through ``Format.round``, unit by unit of ``width`` columns: for any format."""
    width, n = format.width, weight.shape[1]
    work = weight[:, factor.order].contiguous()
    pieces: dict[int, Tensor] = {}
    for first in range(0, n, width):
        unit = slice(first, first + width)
        column = int(factor.order[first])
        place = slice(column, column + width)
        part = format.at(params, place)
        corner = factor.upper[unit, unit]
        metric = None if width == 1 else torch.linalg.inv((corner.T @ corner).double()).diagonal().float()
        chance = None if noise is None else noise[:, place]
        codes = format.round(work[:, unit].contiguous(), part, metric, chance)
        pieces[column] = codes
        error = work[:, unit] - format.decode(codes, part)
        scaled = (
            error / corner
            if width == 1
            else torch.linalg.solve_triangular(corner, error, upper=True, left=False)
        )
        work[:, unit.stop :] -= scaled @ factor.upper[unit, unit.stop :]
    return torch.cat([pieces[column] for column in sorted(pieces)], dim=1)
