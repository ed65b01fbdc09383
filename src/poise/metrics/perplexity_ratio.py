"""Perplexity of the candidate over that of the reference, on the same tokens."""

from typing import ClassVar

from torch import Tensor

from poise.core.metric import LogitMetric


class PerplexityRatio(LogitMetric):
    """Paired window by window: what both models find hard cancels, so the interval is narrow."""

    unit: ClassVar[str] = "ratio"
    protocol: ClassVar[str] = "paired, all tokens but the first of a window"

    def values(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> Tensor:
        column = tokens.unsqueeze(1)
        return (reference.gather(1, column) - candidate.gather(1, column)).squeeze(1)

    def combine(self, means: Tensor) -> Tensor:
        return means.exp()
