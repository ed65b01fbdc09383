"""How often a model repeats itself without end."""

from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric

LONGEST = 32
TIMES = 4


class Loops(AnswerMetric):
    """Share of answers that end in a phrase of at most 32 tokens, four times in a row."""

    unit: ClassVar[str] = "share"
    protocol: ClassVar[str] = f"greedy, ends in {TIMES} repetitions of at most {LONGEST} tokens"

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        return [float(any(_ends_in(answer.tokens, size) for size in range(1, LONGEST + 1)))]


def _ends_in(tokens: tuple[int, ...], size: int) -> bool:
    tail = tokens[-size * TIMES :]
    return len(tail) == size * TIMES and tail == tail[:size] * TIMES
