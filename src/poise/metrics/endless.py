"""How often a model does not come to an end."""

from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric


class Endless(AnswerMetric):
    """Share of answers that reached the limit of tokens without an end token."""

    unit: ClassVar[str] = "share"
    protocol: ClassVar[str] = "greedy, no end token up to the limit"

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        return [float(not answer.ended)]
