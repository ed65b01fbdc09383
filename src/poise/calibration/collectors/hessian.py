"""The Hessian of a layer's squared output error: E[x x^T].

The error of row w is E |(w - w') x|^2 = (w - w') E[x x^T] (w - w')^T. (Frantar et al. 2022, GPTQ, arXiv 2210.17323, up to
a factor of two.)
"""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from poise.calibration.collectors._gram import Chunks, Gram
from poise.core.collector import Collector


@dataclass(kw_only=True, eq=False)
class Hessian(Collector):
    """``hessian`` [columns, columns], exactly symmetric, and its diagonal, ``second_moment`` [columns].

    Memory: one float32 matrix, and 2048 tokens.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._gram = Gram(self.columns)
        self._chunks = Chunks()

    def _add(self, *tensors: Tensor) -> None:
        for (x,) in self._chunks.feed(*tensors):
            self._gram.add(x)

    def _merge(self, other: Self) -> None:
        self._gram.sum += other._gram.plus(x for (x,) in other._chunks.rest()).sum

    def _result(self) -> dict[str, Tensor]:
        mean = self._gram.plus(x for (x,) in self._chunks.rest()).mean(self.n_tokens)
        return {"hessian": mean, "second_moment": mean.diagonal().clone()}
