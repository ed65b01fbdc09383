"""How far the candidate follows the original's answer."""

from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric


class Divergence(AnswerMetric):
    """Tokens before the first that differs, greedy decoding. An answer that never differs counts with its length, so the
    figure depends on how long answers may be."""

    unit: ClassVar[str] = "tokens"
    protocol: ClassVar[str] = "greedy, tokens before the first that differs from the original's"
    lower_is_better: ClassVar[bool] = False
    against: ClassVar[str] = "original"

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        pairs = zip(answer.tokens, other.tokens, strict=False)
        same = min(len(answer.tokens), len(other.tokens))
        return [float(next((place for place, (a, b) in enumerate(pairs) if a != b), same))]
