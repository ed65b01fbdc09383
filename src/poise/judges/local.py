"""A model in an engine of ours as a judge, by the probabilities of the letters A and B."""

from collections.abc import Callable
from typing import Any

import torch

from poise.core.engine import Engine
from poise.core.judge import INSTRUCTION, Judge, preference

LABELS = ("A", "B")


class Local(Judge):
    """Any model that fits: nothing is parsed and nothing is sampled.

    Args:
        name: of the model.
        start: loads the model into an engine, at the first question.
        tokenizer: of the model; its chat template is used if it has one.
    """

    def __init__(self, name: str, start: Callable[[], Engine], tokenizer: Any) -> None:
        self.name, self._start, self._tokenizer = name, start, tokenizer
        self._engine: Engine | None = None
        self._labels = [
            {tokenizer(form + label, add_special_tokens=False)["input_ids"][-1] for form in ("", " ")}
            for label in LABELS
        ]

    def prefers_first(self, request: str, first: str, second: str) -> float:
        text = INSTRUCTION.format(request=request, first=first, second=second)
        if getattr(self._tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": text}]
            text = self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            tokens = self._tokenizer(f"{text}\nThe better answer is", verbose=False)["input_ids"]
        if self._engine is None:
            self._engine = self._start()
        chances = torch.softmax(self._engine.logits(tokens)[-1].double(), -1)
        return preference(*(float(chances[list(ids)].sum()) for ids in self._labels))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
