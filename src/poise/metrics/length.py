"""How long answers are."""

from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric


class Length(AnswerMetric):
    """Tokens of an answer; models are compared by their ratio, the gate of MLPerf inference (0.90 to 1.10)."""

    unit: ClassVar[str] = "tokens"
    protocol: ClassVar[str] = "greedy, tokens of an answer without the end token, mean"
    ratio: ClassVar[bool] = True

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        return [float(len(answer.tokens))]
