"""exp of the mean negative log-likelihood of the text under the candidate."""

from typing import ClassVar

from torch import Tensor

from poise.core.metric import LogitMetric


class Perplexity(LogitMetric):
    """Of every token but the first of each window (Jelinek et al. 1977). Not comparable between
    tokenizers, window lengths or protocols; the protocol is part of the score."""

    unit: ClassVar[str] = "perplexity"
    protocol: ClassVar[str] = "all tokens but the first of a window"

    def values(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> Tensor:
        return -candidate.gather(1, tokens.unsqueeze(1)).squeeze(1)

    def combine(self, means: Tensor) -> Tensor:
        return means.exp()
