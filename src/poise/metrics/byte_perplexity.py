"""exp of the negative log-likelihood of the text, a byte of it."""

from typing import ClassVar

from poise.metrics.perplexity import Perplexity


class BytePerplexity(Perplexity):
    """2 to the power of the bits per byte, under the name that lm-evaluation-harness has for it."""

    protocol: ClassVar[str] = "all tokens but the first of a window, over the bytes they stand for"
    per: ClassVar[str] = "byte"
