"""How varied answers are."""

from itertools import pairwise
from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric

LENGTH = 64


class Distinct(AnswerMetric):
    """Different pairs of neighbouring tokens over all pairs (distinct-2, Li et al. 2016) of the first 64 tokens: longer text
    repeats more, so answers are cut to one length, and shorter ones than 8 tokens give no number."""

    unit: ClassVar[str] = "share"
    protocol: ClassVar[str] = f"distinct-2 of the first {LENGTH} tokens, mean of answers"
    lower_is_better: ClassVar[bool] = False
    shifts: ClassVar[bool] = True

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        tokens = answer.tokens[:LENGTH]
        pairs = list(pairwise(tokens))
        return [len(set(pairs)) / len(pairs) if len(pairs) >= 7 else float("nan")]
