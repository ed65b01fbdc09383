"""Whether what a model writes still makes sense to the original."""

from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric


class Surprise(AnswerMetric):
    """Mean negative log-likelihood of an answer's tokens under the original, nats a token: a proxy of coherence that needs no
    third model. The original's own greedy answers are nearly as unsurprising as text can be, so compare with them. A model
    that says the same all the time is unsurprising too: read it beside ``distinct`` and ``loops``."""

    unit: ClassVar[str] = "nats"
    protocol: ClassVar[str] = "negative log-likelihood of the answer under the original, mean of answers"
    shifts: ClassVar[bool] = True

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        return [answer.surprise]
