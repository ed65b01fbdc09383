"""exp of the negative log-likelihood of the text, a word of it."""

from typing import ClassVar

from torch import Tensor

from poise.core.metric import LogitMetric


class WordPerplexity(LogitMetric):
    """Words are what white space separates, as lm-evaluation-harness counts them: a figure that tokenizers share."""

    unit: ClassVar[str] = "perplexity"
    protocol: ClassVar[str] = "all tokens but the first of a window, over the words they stand for"
    per: ClassVar[str] = "word"

    def values(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> Tensor:
        return -candidate.gather(1, tokens.unsqueeze(1)).squeeze(1)

    def combine(self, means: Tensor) -> Tensor:
        return means.exp()
