"""What came out of comparing a candidate with its reference, and the ranges it is held against."""

import math
from dataclasses import dataclass

from poise.core.metric import Score

DEFAULT_GATES = {
    "size_reduction": 0.5,
    "memory_reduction": 0.5,
    "latency_reduction": 0.5,
    "perplexity_ratio": 1.02,
    "kl": 0.05,
}
"""Acceptance ranges of the field; a recipe adds its own. Costs saved, at least; losses, at most."""
AT_MOST = ("perplexity_ratio", "kl")
QUALITY = ("perplexity_ratio", "kl", "quality_kept")
GATES = (*DEFAULT_GATES, "linear_reduction", "decode_speedup", "throughput_gain", "quality_kept")
"""Every figure that a gate can be set on."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """An acceptance range for one derived figure.

    Attributes:
        name: the figure.
        value: what was measured; NaN when it was not.
        at_least, at_most: the range; one of them is set.
        quality: whether missing it fails the evaluation. Efficiency is reported, reached or not: it
            depends on the machine and engine, and is not what a reader of the exit code asks about.
    """

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    quality: bool = False

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"gate {self.name} needs either at_least or at_most")

    @property
    def limit(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    @property
    def verdict(self) -> str:
        """``reached``, ``missed``, or ``not measured``."""
        if math.isnan(self.value):
            return "not measured"
        low_ok = self.at_least is None or self.value >= self.at_least
        high_ok = self.at_most is None or self.value <= self.at_most
        return "reached" if low_ok and high_ok else "missed"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models."""

    label: str
    source: str
    engine: str
    fingerprint: str
    scores: tuple[Score, ...]

    def value(self, name: str) -> float:
        return next((score.value for score in self.scores if score.name == name), math.nan)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same samples.

    Attributes:
        text: what was read, with its number of windows and tokens.
        scores: fidelity of the candidate to the reference.
        samples: per window and fidelity metric, its score.
    """

    reference: Side
    candidate: Side
    text: str
    text_hash: str
    scores: tuple[Score, ...]
    samples: dict[str, list[float]]
    gates: tuple[Gate, ...]
    command: str
    versions: dict[str, str]

    def value(self, name: str) -> float:
        return next((score.value for score in self.scores if score.name == name), math.nan)

    @property
    def passed(self) -> bool:
        """Whether every quality gate is reached."""
        return all(gate.verdict == "reached" for gate in self.gates if gate.quality)
