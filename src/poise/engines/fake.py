"""An engine for tests: its scores are known in closed form, so metrics can be checked by hand.

Every token scores 0, except that the one after the last token read, ``(last + 1) % vocabulary``, scores
``bias``. Text that counts upwards then has a perplexity of ``(exp(bias) + vocabulary - 1) / exp(bias)``, and
any text has a perplexity of ``vocabulary`` without a bias.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.engine import Engine, Generation
from poise.core.errors import UsageError

STEP = 0.01
"""Seconds that every token of a generation claims to take."""


@dataclass(kw_only=True, eq=False)
class Fake(Engine):
    """Answers without a model; the checkpoint is not even opened."""

    reads: ClassVar[tuple[str, ...]] = ("huggingface", "gguf")
    vocabulary: int = 32
    bias: float = 0.0

    def __post_init__(self) -> None:
        if self.vocabulary < 1:
            raise UsageError(f"fake needs a vocabulary of at least 1, got {self.vocabulary}")

    def load(self, checkpoint: Checkpoint) -> None:
        """Nothing to load."""

    def logits(self, tokens: list[int]) -> Tensor:
        following = (torch.tensor(tokens, dtype=torch.long) + 1) % self.vocabulary
        return self.bias * torch.nn.functional.one_hot(following, self.vocabulary).float()

    def generate(self, tokens: list[int], n: int, stop: Collection[int] = ()) -> Generation:
        made = list(tokens)
        for _ in range(n):
            made.append(int(self.logits(made[-1:])[0].argmax()))
            if made[-1] in stop:
                break
        new = made[len(tokens) :]
        return Generation(tokens=new, seconds=[STEP * (i + 1) for i in range(len(new))])

    def close(self) -> None:
        """Nothing to free."""
