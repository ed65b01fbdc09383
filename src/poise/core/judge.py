"""The contract of a judge: which of two answers to a question is better."""

from abc import ABC, abstractmethod
from typing import ClassVar

INSTRUCTION = """Two answers to the same request are given. Judge which one is better: does it answer the request, does it hang \
together, is it right? Do not mind how long it is, nor which comes first.

Request:
{request}

Answer A:
{first}

Answer B:
{second}

Reply with one letter, A or B: the better answer."""
LEAST = 0.05
"""Probability that the labels must have between them; a judge that wants to say something else has not judged."""


class Judge(ABC):
    """Compares two texts blindly.

    Attributes:
        name: for reports and caches.
    """

    name: str
    scale: ClassVar[str] = "probability of the label that names the first answer, over both labels"

    @abstractmethod
    def prefers_first(self, request: str, first: str, second: str) -> float:
        """Probability that the first answer is the better one; NaN when the judge answered neither.

        Raises:
            EngineError: the judge cannot be reached or does not work.
        """

    def close(self) -> None:  # noqa: B027
        """Frees what the judge holds; it may be asked again afterwards."""


def preference(first: float, second: float) -> float:
    """Of the probabilities of both labels; NaN when there is too little of either (``LEAST``)."""
    both = first + second
    return first / both if both >= LEAST else float("nan")
