"""What the candidate needs to write the text down, a byte of it."""

import math
from typing import ClassVar

from torch import Tensor

from poise.core.metric import LogitMetric


class BitsPerByte(LogitMetric):
    """Negative log-likelihood in bits over the bytes of the text in UTF-8 (Gao et al. 2020, The Pile, equation 1): the one
    figure that models with different tokenizers share."""

    unit: ClassVar[str] = "bits/byte"
    protocol: ClassVar[str] = "bits of all tokens but the first of a window, over the bytes they stand for"
    per: ClassVar[str] = "byte"

    def values(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> Tensor:
        return -candidate.gather(1, tokens.unsqueeze(1)).squeeze(1) / math.log(2)
