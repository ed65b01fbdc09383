"""The contract of an engine: something that runs a model."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from poise.core.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Greedy continuation of a prompt, with the time of every step.

    Attributes:
        tokens: generated token ids.
        seconds: time at which each token was ready, counted from the start of the call.
    """

    tokens: list[int]
    seconds: list[float]


class Engine(ABC):
    """Runs one model. Use as a context manager: leaving it frees the memory."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Kinds of checkpoint it loads: ``huggingface``, ``gguf``."""

    @abstractmethod
    def load(self, checkpoint: Checkpoint) -> None:
        """Raises ``EngineError`` when the runtime refuses the model, ``MissingExtra`` without it."""

    @abstractmethod
    def logits(self, tokens: list[int]) -> Tensor:
        """Scores of the next token after each position, [len(tokens), vocabulary], float32.

        Independent of earlier calls.
        """

    @abstractmethod
    def generate(self, tokens: list[int], n: int, stop: Collection[int] = ()) -> Generation:
        """Continues the prompt by ``n`` greedy tokens, or up to the first of ``stop``, which is the last one then."""

    def generate_many(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        """Continues prompts of one length by ``n`` greedy tokens each, together, as a server does for several users; one after the
        other in runtimes that cannot."""
        return [self.generate(tokens, n).tokens for tokens in prompts]

    @abstractmethod
    def close(self) -> None:
        """Frees the model; calling it twice is harmless."""

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
