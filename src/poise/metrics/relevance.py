"""Whether an answer has to do with its prompt."""

from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric


class Relevance(AnswerMetric):
    """What the prompt does for the answer: its log-likelihood under the original with the prompt, less that without, nats a token
    (pointwise mutual information). An answer that would fit any prompt has little. It needs neither a third model nor an engine that gives
    hidden states, which a similarity of embeddings would."""

    unit: ClassVar[str] = "nats"
    protocol: ClassVar[str] = (
        "log-likelihood under the original with the prompt, less without, mean of answers"
    )
    lower_is_better: ClassVar[bool] = False

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        return [answer.unprompted - answer.surprise]
