"""Tasks of lm-evaluation-harness, run on any engine, item by item.

The harness builds prompts, splits contexts from continuations and scores; only the model is ours: log-likelihoods and greedy text from
an engine. What the engine answered is kept, so an interrupted run goes on.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from poise.core.errors import MissingExtra, UsageError
from poise.pipeline.cache import Cache
from poise.pipeline.progress import Progress
from poise.pipeline.scoring import Lazy

METRICS = ("acc", "acc_norm", "exact_match")
"""Figures of an item that are yes or no."""
LONGEST = 256
"""Tokens of an answer where a task does not say."""


def run_tasks(
    model: Lazy,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None,
    folder: Path | None,
    context: int,
    cache: Cache,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Right (1) and wrong (0) of every item.

    Args:
        tasks: names that the harness knows, or of files in ``folder``.
        limit: first items of each task, or all.
        folder: with task definitions (YAML) of one's own.
        context: tokens that the model may read at once.

    Returns:
        ``task metric`` -> item -> 1 or 0.

    Raises:
        MissingExtra: the harness is not installed.
        UsageError: it knows no such task, or no item of it is right or wrong.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra("lm-eval", "tasks") from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UsageError(f"lm-eval knows no task {', '.join(unknown)}; lm-eval ls tasks lists them")
    runner = _runner()(model, tokenizer, context, cache, progress)
    done = simple_evaluate(
        model=runner,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    found: dict[str, dict[str, float]] = {}
    for task, items in done["samples"].items():
        for item in items:
            for metric in METRICS:
                if metric in item:
                    found.setdefault(f"{task} {metric}", {})[str(item["doc_id"])] = float(item[metric])
    if not found:
        raise UsageError(f"{', '.join(tasks)}: no item is right or wrong by {', '.join(METRICS)}")
    return found


def _runner() -> Any:
    """The class; its base comes from the harness, which is loaded when it is used."""
    from lm_eval.api.model import TemplateLM

    class Runner(TemplateLM):  # type: ignore[misc]
        """An engine as the harness sees a model."""

        def __init__(
            self, model: Lazy, tokenizer: Any, context: int, cache: Cache, progress: Progress
        ) -> None:
            super().__init__()
            self.tokenizer, self._model, self._context = tokenizer, model, context
            self._cache, self._progress = cache, progress

        @property
        def eot_token_id(self) -> int:
            token: int = self.tokenizer.eos_token_id
            return token

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

        @property
        def tokenizer_name(self) -> str:
            return str(self.tokenizer.name_or_path)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            opening = self.tokenizer.bos_token
            if add_special_tokens is None:
                add_special_tokens = not (opening and string.startswith(opening))
            ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)[
                "input_ids"
            ]
            return ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            found = []
            for number, (_texts, asked, made) in enumerate(requests, 1):
                tokens = [*asked, *made][-(self._context + 1) :]
                key = _key("likelihood", tokens, len(made))
                if key not in self._cache:
                    expected = torch.log_softmax(self._model.engine.logits(tokens[:-1]), -1)[-len(made) :]
                    following = torch.tensor(made[-len(expected) :])
                    likelihood = float(expected.gather(1, following.unsqueeze(1)).sum())
                    self._cache[key] = [likelihood, bool((expected.argmax(-1) == following).all())]
                found.append((self._cache[key][0], self._cache[key][1]))
                self._progress("choose", number, len(requests))
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise UsageError("tasks that read whole texts are not run here; give the text itself with --text")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            found = []
            for number, request in enumerate(requests, 1):
                text, wish = request.args
                ends = wish.get("until") or []
                ends = [ends] if isinstance(ends, str) else ends
                most = min(int(wish.get("max_gen_toks") or LONGEST), self._context - 1)
                asked = self.tok_encode(text)[-(self._context - most) :]
                key = _key("text", asked, most)
                if key not in self._cache:
                    self._cache[key] = self._model.engine.generate(asked, most, {self.eot_token_id}).tokens
                made = [token for token in self._cache[key] if token != self.eot_token_id]
                answer = self.tokenizer.decode(made)
                found.append(min((answer.split(end)[0] for end in ends if end), key=len, default=answer))
                self._progress("answer", number, len(requests))
            return found

    return Runner


def _key(kind: str, tokens: Sequence[int], size: int) -> str:
    return hashlib.sha256(json.dumps([kind, list(tokens), size]).encode()).hexdigest()[:24]
