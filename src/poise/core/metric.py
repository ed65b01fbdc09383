"""The contract of a metric: (reference, candidate) -> scores, paired on the same samples."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
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
        rounds: single measurements, where several models took turns.
    """

    name: str
    value: float
    unit: str
    protocol: str
    low: float = float("nan")
    high: float = float("nan")
    n: int = 1
    n_unscored: int = 0
    rounds: tuple[float, ...] = ()

    @classmethod
    def of_rounds(cls, name: str, values: Sequence[float], unit: str, protocol: str) -> "Score":
        """Median of repeated measurements, with their range as interval."""
        return cls(
            name=name,
            value=median(values),
            low=min(values),
            high=max(values),
            unit=unit,
            protocol=protocol,
            n=len(values),
            rounds=tuple(values),
        )


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
    """Scores the positions of a text from what both models expect there.

    Attributes:
        per: what the score of a text is a mean over: ``token``, or ``byte`` or ``word`` of the text.
    """

    per: ClassVar[str] = "token"

    @abstractmethod
    def values(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> Tensor:
        """One figure a position, [positions].

        Args:
            reference, candidate: float32 log-probabilities [positions, vocabulary]; row i predicts ``tokens[i]``.
            tokens: the token that really followed each position, [positions].
        """

    def sample(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> float:
        """Mean over the positions of one window."""
        return float(self.values(reference, candidate, tokens).double().mean())

    def combine(self, means: Tensor) -> Tensor:
        """What the score is of the mean figure; element by element."""
        return means

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
        means = self.combine(scored[picks].mean(-1))
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        known = n > 1
        return Score(
            name=name,
            value=float(self.combine(scored.mean())),
            low=low if known else float("nan"),
            high=high if known else float("nan"),
            unit=self.unit,
            protocol=f"{self.protocol}, {windows}",
            n=n,
            n_unscored=len(samples) - n,
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote, or what a data set wants.

    Attributes:
        tokens: without the end token; empty for what no model wrote.
        ended: whether the model came to an end by itself.
        surprise: mean negative log-likelihood of the tokens under the original, nats; NaN where unknown.
        elsewhere: the same after the next prompt instead of its own.
    """

    text: str
    tokens: tuple[int, ...] = ()
    ended: bool = True
    surprise: float = float("nan")
    elsewhere: float = float("nan")


class AnswerMetric(Metric):
    """Scores generated text.

    A score of many answers is a function of the sums of a few columns: so corpus measures such as BLEU have intervals
    and pairs like any other.

    Attributes:
        against: what an answer is held against: the data set's ``wanted`` answer, the ``original`` model's answer, the same
            model's answer to the ``next`` prompt, or ``nothing``.
        ratio: whether models are compared by the quotient of their scores rather than by the difference.
        shifts: whether it is also told how far single answers moved: a mean may stay where its answers do not.
    """

    against: ClassVar[str] = "nothing"
    ratio: ClassVar[bool] = False
    shifts: ClassVar[bool] = False

    @abstractmethod
    def columns(self, answer: Answer, other: Answer) -> list[float]:
        """One row for one answer.

        Args:
            other: what it is held against; the answer itself if that is nothing.
        """

    def combine(self, sums: Tensor, n: Tensor) -> Tensor:
        """Score [...] of sums of columns [..., columns] over ``n`` answers [...]."""
        return sums[..., 0] / n


class SystemMetric(Metric):
    """Measures what a model costs to keep and to run."""

    @abstractmethod
    def measure(self, subjects: list[Subject]) -> list[list[Score]]:
        """Scores of every subject, in the given order; repeated measurements are interleaved."""
