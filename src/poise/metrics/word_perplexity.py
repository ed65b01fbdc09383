"""exp of the negative log-likelihood of the text, a word of it."""

from typing import ClassVar

from poise.metrics.perplexity import Perplexity


class WordPerplexity(Perplexity):
    """Words are what white space separates, as lm-evaluation-harness counts them: a figure that tokenizers share."""

    protocol: ClassVar[str] = "all tokens but the first of a window, over the words they stand for"
    per: ClassVar[str] = "word"
