"""Whether a candidate is good enough: figures with intervals against ranges that were fixed before the data."""

from dataclasses import dataclass
from typing import Any

from poise.core.comparison import Side
from poise.core.metric import Score

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Range:
    """What a figure may be. One end at least is set.

    Raises:
        ValueError: neither is, or nothing lies between them.
    """

    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        low, high = self.at_least, self.at_most
        if low is None and high is None:
            raise ValueError("a range needs at_least, at_most or both")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"nothing lies between {low:g} and {high:g}")

    def __str__(self) -> str:
        low, high = self.at_least, self.at_most
        if low is not None and high is not None:
            return f"{low:g} to {high:g}"
        return f">= {low:g}" if low is not None else f"<= {high:g}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One figure of a candidate, held against its range.

    Attributes:
        name: the figure.
        value: estimate; NaN when it was not measured.
        low, high: ends of the 90 % interval, each of which is a 95 % bound to its own side.
        allowed: the range.
        verdict: ``pass`` if the bounds lie inside, ``fail`` if the interval lies outside, after correction for the
            number of figures; else ``inconclusive``; ``not measured`` where there is no figure.
        reason: why, in words.
        n: samples; in ``documents`` that are independent.
        detectable: the smallest true figure that this run would have failed four times in five; NaN where unknown.
        more: further samples that would decide; None if it is decided, or if no number of them would.
    """

    name: str
    value: float
    low: float
    high: float
    allowed: Range
    verdict: str
    reason: str
    n: int = 0
    documents: int = 0
    detectable: float = float("nan")
    more: int | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """A figure of some of the samples: of a domain, of positions in a window, of a layer."""

    name: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    n: int = 1


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What both models answered to a prompt."""

    prompt: str
    wanted: str | None
    original: str
    candidate: str


@dataclass(frozen=True, kw_only=True)
class Strength:
    """What votes say: chance of winning against the original with its 95 % interval, and votes that the model was in."""

    name: str
    value: float
    low: float
    high: float
    votes: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """A candidate.

    Attributes:
        side: the model with figures of its own.
        scores: fidelity to the original.
        findings: figures that decide.
        parts: divergence ``by domain`` and ``by position``, error ``by layer``.
        answers: some of them, side by side.
        notes: what could not be measured, and why.
    """

    side: Side
    scores: tuple[Score, ...]
    findings: tuple[Finding, ...]
    parts: dict[str, tuple[Part, ...]]
    answers: tuple[Answered, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``fail`` if a finding fails, ``pass`` if all that were measured pass, and there is one; else ``inconclusive``."""
        found = [finding.verdict for finding in self.findings]
        if FAIL in found:
            return FAIL
        decided = [verdict for verdict in found if verdict != NOT_MEASURED]
        return PASS if decided and set(decided) == {PASS} else INCONCLUSIVE

    @property
    def reason(self) -> str:
        """Of the findings that made the verdict."""
        if self.verdict == PASS:
            passed = [finding.name.replace("_", " ") for finding in self.findings if finding.verdict == PASS]
            return f"{', '.join(passed)} within range"
        reasons = [finding.reason for finding in self.findings if finding.verdict == self.verdict]
        return "; ".join(reasons) or "nothing was measured"

    def value(self, name: str) -> float:
        """A figure of the model or of its fidelity; NaN if there is none."""
        return next(
            (score.value for score in (*self.scores, *self.side.scores) if score.name == name), float("nan")
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Any number of candidates against one original.

    Attributes:
        data: what was read: name, hash, samples of each.
        facts: versions, seed, command: what is needed to do it again.
    """

    original: Side
    rows: tuple[Row, ...]
    data: tuple[dict[str, Any], ...]
    facts: dict[str, Any]

    @property
    def verdict(self) -> str:
        """The worst of the candidates."""
        found = {row.verdict for row in self.rows}
        return next((word for word in (FAIL, INCONCLUSIVE, PASS) if word in found), INCONCLUSIVE)
