"""Half-quadratic quantization: parameters that let a few weights be far off so that the rest is near; no data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from poise.core.errors import UsageError
from poise.core.format import Format, Params, QTensor
from poise.core.solver import Solver


@dataclass(frozen=True, kw_only=True)
class Hqq(Solver):
    """Minimises sum |w - w'|^p with p below one, so that outliers do not pull the grid to themselves.

    In turn: codes to nearest; what is taken for outlying, e = sign(r) max(0, |r| - |r|^(p-1) / beta) with r the error in
    units of the scale; parameters by least squares for w - e (Badri and Shaji 2023, Half-Quadratic Quantization of Large
    Machine Learning Models, equations 3 to 6). The best parameters of every group are kept.

    Deviations: every parameter in which decoding is linear is fitted, where the original fits the zero point alone; an
    integer zero point moves to the nearest integer; errors are in units of the scale, because the original's beta of 10
    takes no error of a weight below 0.1 for outlying.

    Formats without linear parameters get what ``cover`` gives.

    Attributes:
        p: exponent of the norm.
        beta: strength of the coupling, times ``growth`` in every round.
        rounds: all of them, so that rows do not depend on one another.
    """

    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 2 or self.beta <= 0 or self.growth < 1:
            raise UsageError("p is between 0 and 2, beta positive, growth at least 1")

    def solve_slab(
        self, weight: Tensor, format: Format, shared: Any, start: QTensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Params]:
        params = format.cover(weight)
        if weight.numel() and format.linear:
            params = self._improve(weight, format, params)
        return format.round(weight, params, noise=noise), params

    def _improve(self, weight: Tensor, format: Format, params: Params) -> Params:
        columns = weight.shape[1]
        span = format.span_of(format.linear[0], columns)
        best, least, beta = params, torch.full((len(weight), -(-columns // span)), torch.inf), self.beta
        for _ in range(self.rounds):
            codes = format.round(weight, params)
            basis = format.basis(codes, params)
            step = _spread(params[format.linear[0]].float().abs().clamp(min=1e-12), span, columns)
            error = (weight - format.decode(codes, params)) / step
            now = _sums(error.abs().pow(self.p), span)
            better = now < least
            moving = [key for key in params if key in format.linear or key == "zero"]
            best = {**params, **{key: _chosen(better, params[key], best[key]) for key in moving}}
            least = torch.where(better, now, least)
            size = error.abs().clamp(min=1e-12)
            outlying = error.sign() * (size - size.pow(self.p - 1) / beta).clamp(min=0)
            params = _fitted(weight - outlying * step, codes, format, params, basis, span)
            beta *= self.growth
        return best


def _fitted(
    target: Tensor, codes: Tensor, format: Format, params: Params, basis: dict[str, Tensor], span: int
) -> Params:
    """Linear parameters of least squares for a target and codes, and the integer zero point after them."""
    new = dict(params)
    keys = list(basis)
    if (
        "zero" in params
    ):  # w = s (q - z): the zero point is what q s - w says on average, to the nearest integer
        step = params["scale"].float()
        count = _sums(torch.ones_like(target), span)
        raised = basis["scale"] + _spread(params["zero"].float(), span, target.shape[1])
        mean = (_sums(raised, span) - _sums(target, span) / torch.where(step == 0, torch.inf, step)) / count
        new["zero"] = mean.round().clamp(0, 2**format.bits - 1).to(params["zero"].dtype)
        basis = {"scale": raised - _spread(new["zero"].float(), span, target.shape[1])}
    square = {(a, b): _sums(basis[a] * basis[b], span) for a in keys for b in keys}
    slope = {key: _sums(basis[key] * target, span) for key in keys}
    if len(keys) == 1:
        (key,) = keys
        found = {key: torch.where(square[key, key] > 0, slope[key] / square[key, key], params[key].float())}
    else:
        a, b = keys
        determinant = square[a, a] * square[b, b] - square[a, b].square()
        sound = determinant > 1e-6 * square[a, a] * square[b, b]
        first = (slope[a] * square[b, b] - slope[b] * square[a, b]) / determinant
        second = (slope[b] * square[a, a] - slope[a] * square[a, b]) / determinant
        found = {
            a: torch.where(sound, first, params[a].float()),
            b: torch.where(sound, second, params[b].float()),
        }
    for key, value in found.items():
        stored = value.to(params[key].dtype)
        new[key] = torch.where(torch.isfinite(stored), stored, params[key])
    return new


def _spread(values: Tensor, span: int, columns: int) -> Tensor:
    return values.repeat_interleave(span, dim=1)[:, :columns]


def _sums(values: Tensor, span: int) -> Tensor:
    """Sums over runs of ``span`` columns; the last may be shorter."""
    return pad(values, (0, -values.shape[1] % span)).view(len(values), -1, span).sum(-1)


def _chosen(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """New parameters where their run is better: each may have several entries a run."""
    share = new.shape[1] // better.shape[1] if new.dim() == 2 else 1
    return torch.where(better.repeat_interleave(share, dim=1) if share > 1 else better, new, old)
