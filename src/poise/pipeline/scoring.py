"""Both models read the same windows; what every window came to is kept, and logits never are."""

import base64
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.core.engine import Engine
from poise.core.metric import LogitMetric
from poise.core.registry import get, names
from poise.pipeline.cache import Cache
from poise.pipeline.progress import Progress
from poise.pipeline.samples import Window

OWN = ("perplexity", "bits-per-byte", "byte-perplexity", "word-perplexity")
"""Metrics of one model, that the original has too."""

Start = Callable[[], Engine]


def logit_metrics() -> dict[str, LogitMetric]:
    """All, by name."""
    return {
        name: get("metric", name)()
        for name in names("metric")
        if issubclass(get("metric", name), LogitMetric)
    }


class Lazy:
    """An engine that is started at its first use: a run whose scores are all known loads no model."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = self._start()
        return self._engine

    def close(self) -> None:
        """Frees the model, if it was ever there."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def score_pair(
    original: Lazy, candidate: Lazy, windows: Sequence[Window], cache: Cache, progress: Progress
) -> list[dict[str, Any]]:
    """A record a window: positions, bytes, sums of every metric, and the divergence of every position.

    Memory holds the log-probabilities of one window.
    """
    metrics = logit_metrics()
    for number, window in enumerate(windows, 1):
        if window.key not in cache:
            p, q = (_expected(model.engine, window) for model in (original, candidate))
            cache[window.key] = _record(metrics, p, q, window)
        progress("read", number, len(windows))
    return [cache[window.key] for window in windows]


def score_alone(
    model: Lazy, windows: Sequence[tuple[str, list[int], int]], cache: Cache
) -> list[dict[str, float]]:
    """Bits of windows that another tokenizer cut: (key, tokens, bytes)."""
    for key, tokens, size in windows:
        if key not in cache:
            expected = torch.log_softmax(model.engine.logits(tokens)[:-1], -1)
            bits = -expected.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).double().sum() / math.log(2)
            cache[key] = {"bits": float(bits), "bytes": size}
    return [cache[key] for key, _, _ in windows]


def floor(model: Lazy, windows: Sequence[Window]) -> float:
    """Divergence of a model from itself: what differences of this size mean nothing."""
    kl = get("metric", "kl")()
    found = []
    for window in windows:
        p, q = (_expected(model.engine, window) for _ in range(2))
        found.append(kl.sample(p, q, torch.tensor(window.tokens[window.first + 1 :])))
    return float(np.mean(found))


def _expected(engine: Engine, window: Window) -> Tensor:
    return torch.log_softmax(engine.logits(list(window.tokens))[window.first : -1], -1)


def _record(metrics: dict[str, LogitMetric], p: Tensor, q: Tensor, window: Window) -> dict[str, Any]:
    following = torch.tensor(window.tokens[window.first + 1 :])
    values = {name: metric.values(p, q, following).double() for name, metric in metrics.items()}
    own = {name: metrics[name].values(p, p, following).double() for name in OWN}
    return {
        "positions": len(following),
        "bytes": len(window.text.encode()),
        "sums": {name: float(value.sum()) for name, value in values.items()},
        "original": {name: float(value.sum()) for name, value in own.items()},
        "kl": base64.b64encode(values["kl"].float().numpy().astype("<f4").tobytes()).decode(),
    }


def divergences(record: dict[str, Any]) -> NDArray[np.float32]:
    """Of every position of a window."""
    return np.frombuffer(base64.b64decode(record["kl"]), dtype="<f4")
