"""The contract of a metric: (reference, candidate) -> scores, paired on the same samples."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.engine import Engine

BOOTSTRAP = 2000
"""Resamples behind an interval: its ends move by about 2 % of its width from seed to seed."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure about one model.

    Attributes:
        name: what was measured, ``perplexity``; the unit is part of the contract of the metric.
        value: NaN when nothing could be scored.
        low, high: ends of the 95 % interval; NaN where none is known.
        n: samples behind it; ``n_unscored`` more gave no number.
        protocol: how it was measured, so that only like is compared with like.
    """

    name: str
    value: float
    unit: str
    protocol: str
    low: float = float("nan")
    high: float = float("nan")
    n: int = 1
    n_unscored: int = 0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in an engine, as efficiency metrics see it.

    Attributes:
        label: name in tables.
        start: loads the model into a new engine.
        probe: command that loads and runs it in a fresh process and prints its memory as JSON.
    """

    label: str
    checkpoint: Checkpoint
    engine: str
    start: Callable[[], Engine]
    probe: list[str]


class Metric(ABC):
    """Something that is measured. ``unit`` and ``protocol`` go into every score."""

    unit: ClassVar[str] = ""
    protocol: ClassVar[str] = ""
    lower_is_better: ClassVar[bool] = True


class LogitMetric(Metric):
    """Scores a window of text from the logits of both models on the same tokens."""

    @abstractmethod
    def sample(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> float:
        """Score of one window.

        Args:
            reference, candidate: float32 logits [positions, vocabulary]; row i predicts ``tokens[i]``.
            tokens: the token that really followed each position, [positions].
        """

    def combine(self, samples: Tensor) -> Tensor:
        """Scores of windows [..., n] to the score of the text, over the last axis."""
        return samples.mean(-1)

    def score(self, name: str, samples: list[float], windows: str, seed: int = 0) -> Score:
        """The text's score with a percentile bootstrap interval over windows.

        Windows are the unit because tokens of one window depend on each other. (Efron 1979.)
        """
        values = torch.tensor(samples, dtype=torch.float64)
        scored = values[torch.isfinite(values)]
        n = len(scored)
        if n == 0:
            protocol = f"{self.protocol}, {windows}"
            return Score(
                name=name, value=float("nan"), unit=self.unit, protocol=protocol, n=0, n_unscored=len(samples)
            )
        picks = torch.randint(n, (BOOTSTRAP, n), generator=torch.Generator().manual_seed(seed))
        means = self.combine(scored[picks])
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        known = n > 1
        return Score(
            name=name,
            value=float(self.combine(scored)),
            low=low if known else float("nan"),
            high=high if known else float("nan"),
            unit=self.unit,
            protocol=f"{self.protocol}, {windows}",
            n=n,
            n_unscored=len(samples) - n,
        )


class SystemMetric(Metric):
    """Measures what a model costs to keep and to run."""

    @abstractmethod
    def measure(self, subjects: list[Subject]) -> list[list[Score]]:
        """Scores of every subject, in the given order; repeated measurements are interleaved."""
