"""Error feedback: what one column loses, the columns after it make up for (GPTQ, block LDLQ)."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from poise.core.errors import FormatError, UsageError
from poise.core.format import Format, Params, QTensor
from poise.core.hessian import Factor, damped, factorize
from poise.core.registry import spec_of
from poise.core.solver import Solver
from poise.core.stats import Stats
from poise.kernels.ladders import Ladders, ladders_of
from poise.solvers._sweep import sweep

Shared = tuple[Tensor | None, Factor | Tensor | None]
"""Importance of columns for their parameters, and the factor of the Hessian; the Hessian itself for formats that round whole rows."""
STEPS = 3
"""Of descent for formats that round whole rows; ``refine`` goes on from there."""


@dataclass(frozen=True, kw_only=True)
class Gptq(Solver):
    """Minimises tr (W - W') H (W - W')^T greedily, column by column, with H = E[x x^T] of the layer's inputs.

    Columns come in turn, with what those before have lost: w'_k = Q(w_k + sum_j<k (w_j - w'_j) R_jk / R_kk), where
    H = R R^T with R upper triangular. (Frantar et al. 2022, arXiv 2210.17323, equations 2 and 3, in the form of Chee et
    al. 2023, QuIP, arXiv 2307.13304, section 3: it is the same, and nothing is inverted.) Formats that round v columns
    together divide by the block R_BB, the block LDLQ of QuIP# (Tseng et al. 2024, arXiv 2402.04396, section 4.1), with
    the diagonal of R_BB R_BB^T, the metric of the block by then, as the importance.

    Deviations from GPTQ: parameters are fitted before the sweep, so that the order of the columns is free for every group;
    the factor is computed in float64; dead columns keep their weight. An error of column j costs H_jj if nothing makes up
    for it, and R_jj^2 after the columns that follow have: parameters are fitted under the geometric mean of the two.

    Without a Hessian this is ``search``.

    Attributes:
        act_order: whether columns of large inputs come first.
        groups: ``static``: parameters are fitted to the original weight; ``twice``: then again to what the sweep has made of
            it, and a second sweep follows; ``refit``: to what the sweep has made of it when it comes to a group, which keeps
            columns in their order.
        damp: added to the diagonal of H, as a share of its mean.
        panel: columns between two updates of all that follow; codes do not depend on it but for rounding errors.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment", "hessian"})
    slab_rows: ClassVar[int] = 128

    act_order: bool = True
    groups: str = "static"
    damp: float = 0.01
    panel: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups not in ("static", "twice", "refit"):
            raise UsageError(f'groups is "static", "twice" or "refit", got {self.groups!r}')
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
        factor = self.factor(format, stats)
        importance = (moment * _pivots(factor, format.width)).sqrt()
        return importance / importance.max().clamp(min=1e-30), factor

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
            return format.descend(weight, format.round(weight, params, importance), params, factor, STEPS)
        codes = self._fed_back(weight, format, params, factor, noise)
        if self.groups == "twice":
            lost = weight - format.decode(codes, params)
            params = format.fit(weight + _carried_in(lost, factor, format.width), importance)
            codes = self._fed_back(weight, format, params, factor, noise)
        return codes, params

    def _fed_back(
        self, weight: Tensor, format: Format, params: Params, factor: Factor, noise: Tensor | None
    ) -> Tensor:
        """Codes of columns in the order of the factor."""
        ladders = ladders_of(format, params, *weight.shape) if noise is None else None
        if ladders is None:
            return feed_back(weight, format, params, factor, noise)
        lines = weight.index_select(1, factor.order).T.contiguous()
        index = self._sweep(lines, ladders._replace(group=ladders.group[factor.order]), factor, 0)
        return ladders.decode(index[torch.argsort(factor.order)].T.contiguous())

    def _sweep(self, lines: Tensor, ladders: Ladders, factor: Factor, start: int) -> Tensor:
        """Positions in the ladders of the columns from ``start`` on, [columns, rows].

        Args:
            lines: [n, rows], columns of the weight in the order of the factor, of those before ``start`` what they lose;
                what is swept becomes what it loses as well.
        """
        stop = start + len(ladders.group)
        values, group = ladders.values.permute(1, 2, 0).contiguous().numpy(), ladders.group.numpy()
        index = torch.empty(stop - start, lines.shape[1], dtype=torch.uint8)
        for first in range(start, stop, self.panel):
            place = slice(first, min(first + self.panel, stop))
            part = slice(first - start, place.stop - start)
            corner = factor.upper[place, place]
            pivots = corner.diagonal()
            target = lines[place] + _carried(lines, factor, place) / pivots.unsqueeze(1)
            feedback = (corner / pivots).numpy()
            sweep(lines[place].numpy(), target.numpy(), feedback, values, group[part], index[part].numpy())
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
        lines, codes, params = weight.T.contiguous(), [], []
        for first in range(0, n, run):
            place = slice(first, first + run)
            weigh = None if importance is None else importance[place]
            part = format.fit(_target(lines, factor, place), weigh)
            ladders = ladders_of(format, part, rows, run)
            assert ladders is not None  # it has an alphabet
            codes.append(ladders.decode(self._sweep(lines, ladders, factor, first).T.contiguous()))
            params.append(part)
        joined = {key: torch.cat([part[key] for part in params], dim=1) for key in params[0]}
        return torch.cat(codes, dim=1), joined


def feed_back(weight: Tensor, format: Format, params: Params, factor: Factor, noise: Tensor | None) -> Tensor:
    """Error feedback through ``Format.round``, unit by unit of ``width`` columns: for any format."""
    width, n = format.width, weight.shape[1]
    lines = weight.index_select(1, factor.order).T.contiguous()
    pieces: dict[int, Tensor] = {}
    for first in range(0, n, width):
        unit = slice(first, first + width)
        column = int(factor.order[first])
        place = slice(column, column + width)
        part = format.at(params, place)
        metric = None if width == 1 else factor.upper[unit, unit].square().sum(1)
        chance = None if noise is None else noise[:, place]
        codes = format.round(_target(lines, factor, unit), part, metric, chance)
        pieces[column] = codes
        lines[unit] -= format.decode(codes, part).T
    return torch.cat([pieces[column] for column in sorted(pieces)], dim=1)


def _carried(lines: Tensor, factor: Factor, unit: slice) -> Tensor:
    """(E R)^T for the columns of a unit, E what the columns before it have lost: they stand in ``lines`` as that."""
    return factor.upper[: unit.start, unit].T @ lines[: unit.start]


def _target(lines: Tensor, factor: Factor, unit: slice) -> Tensor:
    """What a unit is rounded from: its weights and what makes up best for those before, [rows, width]."""
    made_up = over(_carried(lines, factor, unit).T, factor.upper[unit, unit])
    return (lines[unit].T + made_up).contiguous()


def _blocks(factor: Factor, width: int) -> Tensor:
    """R_BB of every unit B, [units, width, width]."""
    units = len(factor.order) // width
    return factor.upper.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _pivots(factor: Factor, width: int) -> Tensor:
    """What an error of each column costs when all after its unit make up for it, [n]: the diagonal of R_BB R_BB^T."""
    found = torch.empty(len(factor.order))
    found[factor.order] = _blocks(factor, width).square().sum(2).flatten()
    return found


def _carried_in(lost: Tensor, factor: Factor, width: int) -> Tensor:
    """What was added to every column before it was rounded: (E R)_B R_BB^-1 for the columns before each unit B.

    Args:
        lost: E [rows, n], what each column lost.
    """
    inner = lost[:, factor.order]
    units = (len(lost), -1, width)
    carried = (inner @ factor.upper).reshape(units).transpose(0, 1)
    made_up = over(carried, _blocks(factor, width)).transpose(0, 1).flatten(1)
    found = torch.empty_like(lost)
    found[:, factor.order] = made_up - inner
    return found


def over(x: Tensor, upper: Tensor) -> Tensor:
    """X R^-1 for a triangular R."""
    found: Tensor = torch.linalg.solve_triangular(upper, x, upper=True, left=False)
    return found
