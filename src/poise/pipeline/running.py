"""Candidates that run elsewhere: they answer, and what an answer takes can be timed from here; probabilities they keep."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from poise.checkpoints.running import Running
from poise.core.checkpoint import Checkpoint
from poise.core.comparison import Side
from poise.core.errors import EngineError
from poise.core.metric import Answer, Score
from poise.endpoints.client import Client
from poise.pipeline.cache import Cache
from poise.pipeline.progress import Progress
from poise.pipeline.samples import Prompt
from poise.pipeline.subjects import measure, system_names

STREAMS = (1, 4, 16)
ROUNDS = 3
GENERATED = 32
WORDS = "Tell a long story in which the number {} matters."


def ask(
    client: Client, prompts: Sequence[Prompt], tokenizer: Any, limit: int, cache: Cache, progress: Progress
) -> list[Answer]:
    """Greedy answers of at most ``limit`` tokens, in the tokens of the original."""
    for number, prompt in enumerate(prompts, 1):
        if prompt.key not in cache:
            cache[prompt.key] = _answer(client, prompt, limit)
        progress("ask", number, len(prompts))
    found = []
    for record in (cache[prompt.key] for prompt in prompts):
        tokens = tokenizer(record["text"], add_special_tokens=False, verbose=False)["input_ids"]
        found.append(Answer(text=record["text"], tokens=tuple(tokens), ended=record["ended"]))
    return found


def _answer(client: Client, prompt: Prompt, limit: int) -> dict[str, Any]:
    """The endpoint puts a conversation into its own chat template; a model without one is given the bare text."""
    if prompt.turns:
        reply = client.chat(
            [dict(zip(("role", "content"), turn, strict=True)) for turn in prompt.turns], max_tokens=limit
        )
    else:
        reply = client.complete(prompt.text, max_tokens=limit)
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] if prompt.turns else choice["text"]
        return {"text": text or "", "ended": choice.get("finish_reason") == "stop"}
    except (LookupError, TypeError, AttributeError) as error:
        raise EngineError(f"{client.name}: answered no completion ({error!r})") from error


def sides(
    models: Sequence[Checkpoint],
    engines: Sequence[str],
    sources: Sequence[str | Path],
    efficiency: bool,
    progress: Progress,
) -> list[Side]:
    """Size of every model, and cost if it is wanted; of one that runs elsewhere its speed, and nothing else."""
    here = [number for number, model in enumerate(models) if not isinstance(model, Running)]
    measured = measure(
        [models[number] for number in here],
        [engines[number] for number in here],
        [sources[number] for number in here],
        system_names() if efficiency else ["size"],
        progress,
    )
    found = dict(zip(here, measured, strict=True))
    for number, model in enumerate(models):
        if isinstance(model, Running):
            found[number] = Side(
                label=model.client.name,
                source=model.source,
                engine="endpoint",
                fingerprint=model.fingerprint(),
                scores=tuple(speed(model.client)) if efficiency else (),
            )
    return _told_apart([found[number] for number in range(len(models))])


def _told_apart(sides: list[Side]) -> list[Side]:
    """Candidates of one name are numbered."""
    labels = [side.label for side in sides]
    return [
        replace(side, label=f"{side.label} ({labels[:number].count(side.label) + 1})")
        if labels.count(side.label) > 1
        else side
        for number, side in enumerate(sides)
    ]


def speed(client: Client) -> list[Score]:
    """Time to first token and tokens a second with 1, 4 and 16 users at once, network included.

    Every request asks something else, so that no cache of prompts helps; one round warms up.
    """
    firsts: list[float] = []
    scores = []
    asked = 0
    for streams in STREAMS:
        speeds = []
        for turn in range(ROUNDS + 1):
            start = time.perf_counter()
            with ThreadPoolExecutor(streams) as pool:
                made = list(pool.map(lambda n: _timed(client, n), range(asked, asked + streams)))
            took = time.perf_counter() - start
            asked += streams
            if turn:
                speeds.append(sum(tokens for tokens, _ in made) / took)
                firsts += [first for _, first in made] if streams == 1 else []
        name = "throughput" if streams == 1 else f"throughput_at_{streams}"
        scores.append(_score(name, speeds, "tokens/s", streams, client))
    return [_score("time_to_first_token", firsts, "seconds", 1, client), *scores]


def _timed(client: Client, number: int) -> tuple[int, float]:
    """Tokens of a reply, and seconds until its first piece."""
    start = time.perf_counter()
    first, pieces, counted = float("nan"), 0, 0
    for piece in client.stream([{"role": "user", "content": WORDS.format(number)}], GENERATED):
        counted = (piece.get("usage") or {}).get("completion_tokens") or counted
        if any((choice.get("delta") or {}).get("content") for choice in piece.get("choices") or ()):
            first = first if pieces else time.perf_counter() - start
            pieces += 1
    return counted or pieces, first


def _score(name: str, values: list[float], unit: str, streams: int, client: Client) -> Score:
    protocol = f"{streams} streams at once, {GENERATED} tokens out, median and range of {ROUNDS} rounds, {client.name}"
    return Score.of_rounds(name, values, unit, protocol)
