"""Kronecker factors of the Fisher information of a layer: what errors of rows and of columns do to the loss, together.

A token's gradient of the loss by the weight is g x^T. Its second moment, [rows columns, rows columns], is approximated by
H_O (x) H_I, the nearest such product in squared error, as the power method finds it:

    H_I <- E[(g^T H_O g) x x^T] / |H_O|^2        H_O <- E[(x^T H_I x) g g^T] / |H_I|^2

(Tseng et al. 2025, YAQA, arXiv 2505.22988, sketch A, in which tokens count as independent; the labels of the loss are drawn
from the model's own distribution.) Deviations: both factors are updated from the same pass over the tokens, where the
paper takes turns; and they are scaled as below, because the product of their scales moves no code.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from poise.calibration.collectors._gram import Chunks, Gram
from poise.core.collector import Collector
from poise.core.errors import PoiseError


@dataclass(kw_only=True, eq=False)
class Kronecker(Collector):
    """``hessian`` [columns, columns], H_I as the mean of x x^T under weights with a mean of one; ``output`` [rows, rows],
    H_O with a mean diagonal of one (zeros if all gradients are zero); ``second_moment`` [columns], the diagonal of H_I.

    The first pass begins from identities. For another step of the power method call ``turn`` and add all tokens again.

    Memory: four float32 matrices, two of either side, and 2048 tokens of inputs and gradients.

    Attributes:
        rows: outputs of the layer.
    """

    reads: ClassVar[tuple[str, ...]] = ("x", "gradient")

    rows: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._factors = (torch.eye(self.columns), torch.eye(self.rows))
        self._begin()

    def _begin(self) -> None:
        self._inner, self._outer = Gram(self.columns), Gram(self.rows)
        self._weights = torch.zeros(2, dtype=torch.float64)
        self._chunks = Chunks()
        self.n_tokens = 0

    @property
    def widths(self) -> tuple[int, ...]:
        return self.columns, self.rows

    def turn(self) -> None:
        """Ends a pass over the tokens: the next one begins from the factors that this one has found.

        Raises:
            PoiseError: as ``result``.
        """
        found = self.result()
        self._factors = (found["hessian"], found["output"])
        self._begin()

    def _add(self, *tensors: Tensor) -> None:
        for x, gradient in self._chunks.feed(*tensors):
            self._step(self._inner, self._outer, self._weights, x, gradient)

    def _step(self, inner: Gram, outer: Gram, weights: Tensor, x: Tensor, gradient: Tensor) -> None:
        from_x, from_g = (
            ((value @ factor).double() * value).sum(1).clamp_(min=0)
            for value, factor in zip((x, gradient), self._factors, strict=True)
        )
        inner.add(x * from_g.sqrt().float().unsqueeze(1))
        outer.add(gradient * from_x.sqrt().float().unsqueeze(1))
        weights += torch.stack((from_g.sum(), from_x.sum()))

    def _whole(self) -> tuple[Gram, Gram, Tensor]:
        inner, outer, weights = self._inner.plus(iter(())), self._outer.plus(iter(())), self._weights.clone()
        for x, gradient in self._chunks.rest():
            self._step(inner, outer, weights, x, gradient)
        return inner, outer, weights

    def _merge(self, other: Self) -> None:
        if not all(map(torch.equal, self._factors, other._factors)):
            raise PoiseError(f"{self.name}: cannot be merged with {other.name}, which is at another pass")
        inner, outer, weights = other._whole()
        self._inner.sum += inner.sum
        self._outer.sum += outer.sum
        self._weights += weights

    def _result(self) -> dict[str, Tensor]:
        inner, outer, weights = self._whole()
        hessian = inner.mean(float(weights[0]))
        output = outer.mean(1.0)
        output /= output.diagonal().double().mean().clamp(min=torch.finfo(torch.float32).tiny).float()
        return {"hessian": hessian, "output": output, "second_moment": hessian.diagonal().clone()}
