"""Rounding learned by the signs of gradients (SignRound, the method of AutoRound)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.core.format import Format, Params, QTensor
from poise.core.solver import Solver
from poise.core.stats import Stats
from poise.kernels.ladders import Ladders, LinearLadders, begin, ladders_of
from poise.kernels.places import locate, settle
from poise.solvers._learned import better_rows, learnable, starting

REACH = 0.5
"""How far a parameter may move, as a share of itself."""


@dataclass(frozen=True, kw_only=True)
class Signround(Solver):
    """Lowers tr (W - W') H (W - W')^T by learning what is added to every weight before it is rounded.

    w' = the level at round(p + v), p the place of the weight between two levels, v in [-1/2, 1/2], and a factor for every
    parameter in which decoding is linear. Both follow the signs of gradients, straight through the rounding, with a rate
    that falls to zero; the best of all steps is kept, row by row (Cheng et al. 2023, Optimize Weight Rounding via Signed
    Gradient Descent, arXiv 2309.05516, equations 3 to 5 and algorithm 1).

    Deviations: the loss is the output error of the layer, exact for all tokens of H, not that of a block on samples; ranges
    move by the factors of scales and minima, from fitted ones, not by the two ends of the range, so an integer zero point
    stays; any scalar format.

    Codes to begin from are taken up: v counts from the place nearest to the weight that rounds to the code. Formats that
    are not scalar keep the codes that they begin with.

    Attributes:
        steps: of descent.
        rate: of the first step; 1 / ``steps`` if None, which lets v cross half a level.
        scales: whether parameters are learned too.
        damp: as in ``gptq``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment", "hessian"})

    steps: int = 200
    rate: float | None = None
    scales: bool = True
    damp: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or (self.rate is not None and self.rate <= 0) or not 0 <= self.damp <= 1:
            raise UsageError("steps is at least 1, rate is positive, damp is between 0 and 1")

    def prepare(self, weight: Tensor, format: Format, stats: Stats | None) -> Any:
        return learnable(format, stats, self.damp)

    def solve_slab(
        self, weight: Tensor, format: Format, shared: Any, start: QTensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Params]:
        importance, hessian = shared
        codes, params = starting(weight, format, importance, start, noise)
        ladders = ladders_of(format, params, *weight.shape) if weight.numel() else None
        if hessian is None or ladders is None:
            return codes, params
        return better_rows(
            weight,
            format,
            hessian,
            (codes, params),
            self._learn(weight, format, hessian, ladders, codes, params),
        )

    def _learn(
        self, weight: Tensor, format: Format, hessian: Tensor, ladders: Ladders, codes: Tensor, params: Params
    ) -> tuple[Tensor, Params]:
        """The best codes and parameters of every row on the way."""
        keys = format.linear if self.scales else ()
        linear = LinearLadders(format, params, ladders, keys, weight.shape[1])
        rate = 1 / self.steps if self.rate is None else self.rate
        place, offset = begin(weight, ladders, codes)
        added = torch.zeros_like(weight)
        factors = {key: torch.ones_like(params[key], dtype=torch.float32) for key in keys}
        index = torch.empty(weight.shape, dtype=torch.uint8)
        value, gap = torch.empty_like(weight), torch.empty_like(weight)
        values, group = ladders.values, ladders.group.numpy()
        least, kept = torch.full((len(weight),), torch.inf), index.clone()
        now, best = dict(params), dict(params)
        for step in range(self.steps + 1):
            if step and keys:
                now = linear.moved(factors)
                values = linear.values(now)
                locate(weight.numpy(), values.numpy(), group, place.numpy())
            shifted = place + offset + added
            settle(shifted.numpy(), values.numpy(), group, index.numpy(), value.numpy(), gap.numpy())
            gradient = (value - weight) @ hessian
            loss = ((value - weight) * gradient).sum(1)
            fell = loss < least
            least, line = torch.where(fell, loss, least), fell.unsqueeze(1)
            kept = torch.where(line, index, kept)
            best.update({key: torch.where(line, now[key], best[key]) for key in keys})
            pace = rate * (1 - step / self.steps)
            for key in keys:
                slope = linear.slope(key, gradient, place, index)
                factors[key] = (factors[key] - pace * slope.sign()).clamp(1 - REACH, 1 + REACH)
            added = (added - pace * (gradient * gap).sign()).clamp(-0.5, 0.5)
        return ladders.decode(kept), best
