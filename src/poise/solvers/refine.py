"""Coordinate descent of codes under the full Hessian, and scales in closed form, until nothing improves."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.format import Format, Params, QTensor
from poise.core.hessian import damped
from poise.core.solver import Solver
from poise.core.stats import Stats
from poise.kernels.ladders import ladders_of
from poise.solvers._sweep import descend, pair


@dataclass(frozen=True, kw_only=True)
class Refine(Solver):
    """Lowers tr (W - W') H (W - W')^T from given codes; it never rises.

    Two steps alternate. Codes: each in turn to the level that is best when all others stay, then two at a time where one
    alone would gain nothing (for scalar formats; units of several columns to the point nearest to where the gradient
    vanishes, if that is better). Parameters in which decoding is linear: each to its least-squares value when all else
    stays, as it can be stored, if that is better. (The cyclic coordinate descent of LNQ in GuidedQuant, Kim et al. 2025,
    arXiv 2505.07004, for any format; it moves no two codes together.)

    Without codes to begin from it begins with ``search``; without a Hessian it changes nothing.

    Attributes:
        rounds: of codes and parameters, at most.
        least: share of the objective that a round must gain, or it is the last.
        passes: over the columns of a row in one round.
        damp: as in ``gptq``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment", "hessian"})

    rounds: int = 6
    least: float = 2e-3
    passes: int = 4
    damp: float = 0.01
    scales: bool = True

    def prepare(self, weight: Tensor, format: Format, stats: Stats | None) -> Any:
        if stats is None:
            return None, None
        hessian = None if stats.hessian is None else damped(stats.hessian.float(), self.damp)
        return stats.second_moment.float(), hessian

    def solve_slab(
        self, weight: Tensor, format: Format, shared: Any, start: QTensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Params]:
        importance, hessian = shared
        if start is None:
            params = format.fit(weight, importance)
            start = QTensor(
                codes=format.round(weight, params, importance, noise), params=params, format=format
            )
        codes, params = start.codes, start.params
        if hessian is None or not weight.numel():
            return codes, params
        if format.width == 0:
            return format.descend(weight, codes, params, hessian, self.rounds)
        before = torch.inf
        gradient = ((weight - format.decode(codes, params)) @ hessian).contiguous()
        for _ in range(self.rounds):
            codes = descend_codes(format, codes, params, gradient, hessian, self.passes)
            now = float(((weight - format.decode(codes, params)) * gradient).sum())
            if not self.scales or not format.linear or now > (1 - self.least) * before:
                break
            params, before = refit(format, codes, params, gradient, hessian), now
        return codes, params


def descend_codes(
    format: Format, codes: Tensor, params: Params, gradient: Tensor, hessian: Tensor, passes: int
) -> Tensor:
    """Codes after coordinate descent.

    Args:
        gradient: [rows, columns], (W - W') H; kept up to date.
    """
    ladders = ladders_of(format, params, *gradient.shape)
    if ladders is None:
        return _descend_units(format, codes, params, gradient, hessian, passes)
    value, index = format.decode(codes, params).contiguous(), ladders.index_of(codes)
    for move in (descend, pair):
        move(
            value.numpy(),
            gradient.numpy(),
            hessian.numpy(),
            ladders.values.numpy(),
            ladders.group.numpy(),
            index.numpy(),
            passes,
        )
    return ladders.decode(index)


def _descend_units(
    format: Format, codes: Tensor, params: Params, gradient: Tensor, hessian: Tensor, passes: int
) -> Tensor:
    """The same for units of several columns, all rows at once: a row's move is kept where it lowers the objective."""
    codes, width = codes.clone(), format.width
    for _ in range(passes):
        moved = False
        for unit in range(codes.shape[1]):
            place = slice(unit * width, (unit + 1) * width)
            part, block = format.at(params, place), hessian[place, place]
            old = format.decode(codes[:, unit : unit + 1].contiguous(), part)
            wish = old + torch.linalg.solve(block.double(), gradient[:, place].double().T).T.float()
            new = format.round(wish.contiguous(), part, block.diagonal())
            delta = format.decode(new, part) - old
            gain = 2 * (delta * gradient[:, place]).sum(1) - ((delta @ block) * delta).sum(1)
            least = 1e-6 * ((old @ block) * old).sum(1)
            better = _by_tiles(gain - least, format.tile_rows) > 0
            if not bool(better.any()):
                continue
            moved = True
            codes[better, unit : unit + 1] = new[better]
            gradient[better] -= delta[better] @ hessian[place]
        if not moved:
            break
    return codes


def _by_tiles(gain: Tensor, tile_rows: int) -> Tensor:
    """Gains [rows] summed over the rows whose codes hang together, each row with the sum of its tile."""
    if tile_rows <= 1:
        return gain
    tiles = torch.arange(len(gain)) // tile_rows
    return torch.zeros(int(tiles[-1]) + 1).index_add_(0, tiles, gain)[tiles]


def refit(format: Format, codes: Tensor, params: Params, gradient: Tensor, hessian: Tensor) -> Params:
    """Linear parameters, each at its least-squares value in turn.

    Args:
        gradient: [rows, columns], (W - W') H; kept up to date.
    """
    new = {key: value.clone() for key, value in params.items()}
    columns = gradient.shape[1]
    for key, part in format.basis(codes, params).items():
        span = format.span_of(key, columns)
        for entry in range(new[key].shape[1]):
            place = slice(entry * span, min((entry + 1) * span, columns))
            direction = part[:, place]
            stiff = ((direction @ hessian[place, place]) * direction).sum(1)
            old = new[key][:, entry]
            step = torch.where(
                stiff > 0, (direction * gradient[:, place]).sum(1) / stiff.clamp(min=1e-30), 0.0
            )
            stored = (old.float() + step).to(old.dtype)
            delta = stored.float() - old.float()
            slope = (direction * gradient[:, place]).sum(1)
            better = torch.isfinite(stored) & (2 * delta * slope > delta.square() * stiff) & (stored != 0)
            if not bool(better.any()):
                continue
            delta = torch.where(better, delta, 0.0)
            new[key][:, entry] = torch.where(better, stored, old)
            gradient -= (delta.unsqueeze(1) * direction) @ hessian[place]
    return new
