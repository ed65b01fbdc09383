"""Hessians that weigh every token by what the layer's outputs matter there to the loss of the whole model.

The second-order change of the loss by row i is (w - w') E[g_i^2 x x^T] (w - w')^T, g_i the gradient of the loss by output
i: the diagonal, row by row, of the Fisher information. One matrix a row is too much, so rows share the mean of theirs, run
by run: H_k = E[s_k x x^T] with s_k the mean of g_i^2 over the rows i of run k. (Kim et al. 2025, GuidedQuant, arXiv
2505.07004, section 3.2; runs of rows are its groups of output channels. Here each H_k is divided by the mean of its
weights, which moves no code.)
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

import torch
from torch import Tensor

from poise.calibration.collectors._gram import Chunks, Gram
from poise.core.collector import Collector


@dataclass(kw_only=True, eq=False)
class Fisher(Collector):
    """``hessian`` [runs, columns, columns], sum_t s_tk x_t x_t^T / sum_t s_tk; ``second_moment`` [columns], the mean of
    their diagonals; ``saliency`` [runs], the mean weights E[s_k], which tell how much runs matter beside each other.

    A run whose gradients are all zero has a Hessian of zeros. Runs are consecutive and as equal as they can be: run k
    ends before row rows * (k + 1) // runs, as in ``Solver.solve``.

    Memory: ``runs`` float32 matrices, and 2048 tokens of inputs and gradients. Root mean square gradients below 1e-19 are
    lost: scale the loss.

    Attributes:
        rows: outputs of the layer.
        runs: of rows that have a Hessian of their own.
    """

    reads: ClassVar[tuple[str, ...]] = ("x", "gradient")

    rows: int
    runs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.runs <= self.rows:
            raise ValueError(f"{self.name}: {self.rows} rows cannot be cut into {self.runs} runs")
        self._edges = [self.rows * run // self.runs for run in range(self.runs + 1)]
        self._grams = [Gram(self.columns) for _ in range(self.runs)]
        self._weights = torch.zeros(self.runs, dtype=torch.float64)
        self._chunks = Chunks()

    @property
    def widths(self) -> tuple[int, ...]:
        return self.columns, self.rows

    def _saliency(self, gradient: Tensor) -> Tensor:
        """s_tk, [tokens, runs] float64."""
        squares = gradient.double().square_()
        runs = [squares[:, first:last].mean(1) for first, last in pairwise(self._edges)]
        return torch.stack(runs, dim=1)

    def _add(self, *tensors: Tensor) -> None:
        for x, gradient in self._chunks.feed(*tensors):
            saliency = self._saliency(gradient)
            self._weights += saliency.sum(0)
            for gram, weighted in zip(self._grams, _weighted(x, saliency), strict=True):
                gram.add(weighted)

    def _whole(self) -> tuple[list[Gram], Tensor]:
        grams, weights = [gram.plus(iter(())) for gram in self._grams], self._weights.clone()
        for x, gradient in self._chunks.rest():
            saliency = self._saliency(gradient)
            weights += saliency.sum(0)
            for gram, weighted in zip(grams, _weighted(x, saliency), strict=True):
                gram.add(weighted)
        return grams, weights

    def _merge(self, other: Self) -> None:
        grams, weights = other._whole()
        self._weights += weights
        for mine, theirs in zip(self._grams, grams, strict=True):
            mine.sum += theirs.sum

    def _result(self) -> dict[str, Tensor]:
        grams, weights = self._whole()
        means = torch.stack([gram.mean(float(w)) for gram, w in zip(grams, weights, strict=True)])
        moment = means.diagonal(dim1=1, dim2=2).mean(0)
        return {"hessian": means, "second_moment": moment, "saliency": weights / self.n_tokens}


def _weighted(x: Tensor, saliency: Tensor) -> list[Tensor]:
    """For each run sqrt(s) x, whose outer products are s x x^T."""
    return [x * root.unsqueeze(1) for root in saliency.sqrt().float().unbind(1)]
