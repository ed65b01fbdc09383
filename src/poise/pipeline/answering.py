"""Models answer: the likeliest of given choices, or what they write themselves, greedily."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from poise.core.metric import Answer
from poise.pipeline.cache import Cache
from poise.pipeline.progress import Progress
from poise.pipeline.samples import Prompt
from poise.pipeline.scoring import Lazy


def choose(
    model: Lazy, prompts: Sequence[Prompt], tokenizer: Any, cache: Cache, progress: Progress
) -> list[float]:
    """1 where the likeliest choice is the right one, else 0: ``acc`` of lm-eval, log-likelihoods of choices after a space."""
    for number, prompt in enumerate(prompts, 1):
        if prompt.key not in cache:
            scores = [_likelihood(model, prompt.text, choice, tokenizer) for choice in prompt.choices]
            cache[prompt.key] = scores
        progress("choose", number, len(prompts))
    return [float(max(range(len(s)), key=s.__getitem__) == p.right) for p in prompts for s in [cache[p.key]]]


def _likelihood(model: Lazy, context: str, choice: str, tokenizer: Any) -> float:
    """Log-likelihood of a choice after its context, which keep their own tokens where a tokenizer would join them."""
    asked = tokenizer(context, verbose=False)["input_ids"]
    tokens = tokenizer(f"{context} {choice}", verbose=False)["input_ids"]
    start = max(1, min(len(asked), len(tokens) - 1))
    expected = torch.log_softmax(model.engine.logits(tokens[:-1]), -1)[start - 1 :]
    return float(expected.gather(1, torch.tensor(tokens[start:]).unsqueeze(1)).sum())


def write(
    model: Lazy,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    ends: frozenset[int],
    limit: int,
    cache: Cache,
    progress: Progress,
) -> list[Answer]:
    """Greedy answers of at most ``limit`` tokens."""
    for number, prompt in enumerate(prompts, 1):
        if prompt.key not in cache:
            asked = tokenizer(
                prompt.text, add_special_tokens=not _templated(prompt, tokenizer), verbose=False
            )["input_ids"]
            made = model.engine.generate(asked, limit, ends).tokens
            ended = bool(made) and made[-1] in ends
            cache[prompt.key] = {"tokens": made[:-1] if ended else made, "ended": ended}
        progress("answer", number, len(prompts))
    return [
        Answer(text=tokenizer.decode(record["tokens"]), tokens=tuple(record["tokens"]), ended=record["ended"])
        for record in (cache[prompt.key] for prompt in prompts)
    ]


def surprised(
    original: Lazy, prompts: Sequence[Prompt], answers: Sequence[Answer], tokenizer: Any, cache: Cache
) -> list[Answer]:
    """The answers with what the original thinks of them, after their own prompt and after the next one."""
    asked = [
        tokenizer(prompt.text, add_special_tokens=not _templated(prompt, tokenizer), verbose=False)[
            "input_ids"
        ]
        for prompt in prompts
    ]
    found = []
    for number, answer in enumerate(answers):
        after = (number + 1) % len(prompts)
        made = list(answer.tokens)
        key = f"{prompts[number].key} {prompts[after].key} {' '.join(map(str, made))}"
        if key not in cache:
            cache[key] = [_surprise(original, asked[place], made) for place in (number, after)]
        own, elsewhere = cache[key]
        found.append(replace(answer, surprise=own, elsewhere=elsewhere if after != number else math.nan))
    return found


def _surprise(original: Lazy, asked: list[int], made: list[int]) -> float:
    if not made:
        return float("nan")
    expected = torch.log_softmax(original.engine.logits([*asked, *made[:-1]])[len(asked) - 1 :], -1)
    return -float(expected.gather(1, torch.tensor(made).unsqueeze(1)).mean())


def _templated(prompt: Prompt, tokenizer: Any) -> bool:
    """Whether the text has its opening token already, as chat templates write it."""
    return bool(getattr(tokenizer, "chat_template", None)) and not prompt.choices


def end_tokens(checkpoint_config: dict[str, Any], tokenizer: Any) -> frozenset[int]:
    """Ends of an answer by configuration and tokenizer."""
    listed = [checkpoint_config.get("eos_token_id"), tokenizer.eos_token_id]
    flat = [token for item in listed for token in (item if isinstance(item, list) else [item])]
    return frozenset(token for token in flat if isinstance(token, int))
