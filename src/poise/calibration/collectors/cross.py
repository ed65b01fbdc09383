"""Cross moment of a layer's inputs in the original model and behind layers that are quantized: E[x' x^T].

With H = E[x x^T] it gives the weight that best makes up for the layers before, W E[x' x^T] H^-1, where x' are the original
inputs. (Li et al. 2025, GPTAQ, arXiv 2504.02692.)
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from poise.calibration.collectors._gram import Chunks, add_product
from poise.core.collector import Collector


@dataclass(kw_only=True, eq=False)
class Cross(Collector):
    """``cross`` [columns, columns]: rows are original inputs, columns those of the quantized model.

    Memory: one float32 matrix, and 2048 tokens of both.
    """

    reads: ClassVar[tuple[str, ...]] = ("original", "x")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sum = torch.zeros(self.columns, self.columns)
        self._chunks = Chunks()

    def _add(self, *tensors: Tensor) -> None:
        for original, x in self._chunks.feed(*tensors):
            add_product(self._sum, original, x)

    def _whole(self) -> Tensor:
        whole = self._sum.clone()
        for original, x in self._chunks.rest():
            add_product(whole, original, x)
        return whole

    def _merge(self, other: Self) -> None:
        self._sum += other._whole()

    def _result(self) -> dict[str, Tensor]:
        return {"cross": self._whole().div_(self.n_tokens)}
