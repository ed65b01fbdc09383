"""Whether an answer has to do with its prompt."""

from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric


class Relevance(AnswerMetric):
    """How much better an answer fits its own prompt than another one: its negative log-likelihood under the original after the next
    prompt, less that after its own, nats a token (pointwise mutual information, against another prompt instead of none: text that
    repeats what all prompts have in common gains nothing). It needs neither a third model nor an engine that gives hidden states,
    which a similarity of embeddings would."""

    unit: ClassVar[str] = "nats"
    protocol: ClassVar[str] = (
        "negative log-likelihood under the original after the next prompt, less after its own, mean of answers"
    )
    lower_is_better: ClassVar[bool] = False
    shifts: ClassVar[bool] = True

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        return [answer.elsewhere - answer.surprise]
