"""Rounding up or down, learned through a relaxation (AdaRound)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.core.format import Format, Params, QTensor
from poise.core.solver import Solver
from poise.core.stats import Stats
from poise.kernels.ladders import Ladders, begin, ladders_of
from poise.solvers._learned import better_rows, learnable, starting

LOW, HIGH = -0.1, 1.1
"""The sigmoid is stretched to these and clipped, so that it reaches zero and one (equation 23)."""
SOFT, HARD = 20.0, 2.0
"""Exponent of the penalty at first, when it leaves the middle alone, and at last."""
FREE = 0.2
"""Share of the steps without a penalty."""


@dataclass(frozen=True, kw_only=True)
class Adaround(Solver):
    """Lowers tr (W - W') H (W - W')^T by learning for every weight which of the two levels around it to take.

    w' = a + h (b - a) with a and b the levels and h = clip(1.2 sigmoid(u) - 0.1, 0, 1); the loss has lambda sum (1 - |2 h -
    1|^beta) beside, beta falling from 20 to 2, which drives h to zero or one (Nagel et al. 2020, Up or Down? Adaptive
    Rounding for Post-Training Quantization, arXiv 2004.10568, equations 21 to 24). Adam. Parameters stay.

    Deviations: the loss is that of the Hessian, exact for all tokens, not of samples; it is in units of what one level
    costs in a column of the row, so that lambda means the same in every layer; rows that ended worse than they began keep
    what they had; any scalar format.

    Codes to begin from are taken up: the two levels are the code and its neighbour on the side of the weight. Formats that
    are not scalar keep the codes that they begin with.

    Attributes:
        steps: of Adam.
        rate: of Adam.
        penalty: lambda.
        damp: as in ``gptq``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment", "hessian"})

    steps: int = 500
    rate: float = 0.02
    penalty: float = 0.1
    damp: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.rate <= 0 or self.penalty < 0 or not 0 <= self.damp <= 1:
            raise UsageError(
                "steps is at least 1, rate is positive, penalty not negative, damp between 0 and 1"
            )

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
        learned = self._learn(weight, hessian, ladders, codes)
        return better_rows(weight, format, hessian, (codes, params), (learned, params))

    def _learn(self, weight: Tensor, hessian: Tensor, ladders: Ladders, codes: Tensor) -> Tensor:
        place, offset = begin(weight, ladders, codes)
        last = ladders.values.shape[2] - 1
        place = (place + offset).clamp_(0, last)
        low = place.floor().clamp_(max=last - 1)
        line = (torch.arange(len(weight)).unsqueeze(1), ladders.group.long().expand(weight.shape))
        floor = ladders.values[(*line, low.long())]
        gap = ladders.values[(*line, low.long() + 1)] - floor
        share = (place - low).clamp_(0.01, 0.99)
        u = torch.logit((share - LOW) / (HIGH - LOW))
        unit = (
            (gap.square() * hessian.diagonal())
            .mean(1, keepdim=True)
            .clamp(min=torch.finfo(torch.float32).tiny)
        )
        adam = Adam(u, self.rate)
        for step in range(self.steps):
            sigmoid = u.sigmoid()
            h = (sigmoid * (HIGH - LOW) + LOW).clamp_(0, 1)
            slope = 2 * ((floor + h * gap - weight) @ hessian) * gap / unit
            done = (step / self.steps - FREE) / (1 - FREE)
            if done >= 0:
                beta = HARD + (SOFT - HARD) * (1 - done)
                side = 2 * h - 1
                slope -= self.penalty * 2 * beta * side.abs().pow_(beta - 1) * side.sign()
            inside = (h > 0) & (h < 1)
            adam.step(slope * inside * sigmoid * (1 - sigmoid) * (HIGH - LOW))
        index = (low + (u >= 0)).to(torch.uint8)
        return ladders.decode(index)


class Adam:
    """Kingma and Ba 2014, algorithm 1, in place, without the bookkeeping of torch.optim."""

    def __init__(self, x: Tensor, rate: float) -> None:
        self.x, self.rate, self.steps = x, rate, 0
        self.mean, self.square = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, slope: Tensor) -> None:
        self.steps += 1
        self.mean.lerp_(slope, 0.1)
        self.square.mul_(0.999).addcmul_(slope, slope, value=0.001)
        size = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        self.x.addcdiv_(self.mean, size, value=-self.rate / (1 - 0.9**self.steps))
