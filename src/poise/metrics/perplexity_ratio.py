"""Perplexity of the candidate over that of the reference, on the same tokens."""

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from poise.core.metric import LogitMetric


class PerplexityRatio(LogitMetric):
    """Paired window by window: what both models find hard cancels, so the interval is narrow."""

    unit: ClassVar[str] = "ratio"
    protocol: ClassVar[str] = "paired, all tokens but the first of a window"

    def sample(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> float:
        return float(cross_entropy(candidate, tokens) - cross_entropy(reference, tokens))

    def combine(self, samples: Tensor) -> Tensor:
        return samples.mean(-1).exp()
