"""exp of the negative log-likelihood of the text, a byte of it."""

from typing import ClassVar

from torch import Tensor

from poise.core.metric import LogitMetric


class BytePerplexity(LogitMetric):
    """2 to the power of the bits per byte, under the name that lm-evaluation-harness has for it."""

    unit: ClassVar[str] = "perplexity"
    protocol: ClassVar[str] = "all tokens but the first of a window, over the bytes they stand for"
    per: ClassVar[str] = "byte"

    def values(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> Tensor:
        return -candidate.gather(1, tokens.unsqueeze(1)).squeeze(1)

    def combine(self, means: Tensor) -> Tensor:
        return means.exp()
