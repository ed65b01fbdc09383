"""How often the candidate answers word for word what the original answers."""

from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric


class Identical(AnswerMetric):
    """Share of answers whose tokens are those of the original, greedy decoding."""

    unit: ClassVar[str] = "share"
    protocol: ClassVar[str] = "greedy, same tokens as the original"
    lower_is_better: ClassVar[bool] = False
    against: ClassVar[str] = "original"

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        return [float(answer.tokens == other.tokens and answer.ended == other.ended)]
