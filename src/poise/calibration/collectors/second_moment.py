"""Mean squared input of every column: what an error there weighs.

An error e_j in column j of a weight changes the output by e_j x_j. Averaged over inputs that do not correlate, the
squared output error is sum_j e_j^2 E[x_j^2]. (The diagonal of the Hessian of GPTQ, Frantar et al. 2022; llama.cpp calls
it the importance matrix.)
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from poise.core.collector import Collector


@dataclass(kw_only=True, eq=False)
class SecondMoment(Collector):
    """E[x_j^2], ``second_moment`` [columns]; summed in float64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sum = torch.zeros(self.columns, dtype=torch.float64)

    def _add(self, *tensors: Tensor) -> None:
        self._sum += tensors[0].double().square_().sum(0)

    def _merge(self, other: Self) -> None:
        self._sum += other._sum

    def _result(self) -> dict[str, Tensor]:
        return {"second_moment": self._sum / self.n_tokens}
