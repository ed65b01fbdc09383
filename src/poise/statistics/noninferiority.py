"""Not worse than a margin: pass, fail or inconclusive, how much more data would tell, and what could have been seen.

That no difference was found does not show that there is none. A candidate *passes* if the 95 % bounds of its figure lie
inside the range that was fixed before (one-sided tests at 5 %; two of them where the range has two ends, Schuirmann 1987).
It *fails* if the true figure is shown to lie outside. Passing takes every figure of a candidate, so it needs no correction
for their number: an intersection-union test (Berger 1982). Failing takes any one of them, so p-values of failing are
corrected by Holm 1979 over the figures of the candidate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from poise.core.verdict import FAIL, INCONCLUSIVE, NOT_MEASURED, PASS, Finding, Range
from poise.statistics.estimate import Estimate

ALPHA = 0.05
POWER = 0.8
LARGEST = 700.0
"""Logarithm of a ratio that a float still holds."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A figure and its range.

    Attributes:
        estimate: of the figure, or of its logarithm if that is a ``ratio``.
        unit: what more samples are called.
    """

    estimate: Estimate
    allowed: Range
    ratio: bool = False
    unit: str = "samples"

    def link(self, figure: float) -> float:
        """To the scale of the estimate."""
        return math.log(figure) if self.ratio else figure

    def back(self, value: float) -> float:
        """From the scale of the estimate; infinite where a ratio is too large to write down."""
        if not self.ratio:
            return value
        return math.inf if value > LARGEST else math.exp(value)


def judge(questions: Mapping[str, Question]) -> tuple[Finding, ...]:
    """Every figure of one candidate."""
    asked = {name: _outside(q) for name, q in questions.items() if _known(q.estimate)}
    failed = dict(zip(asked, _rejected([*asked.values()]), strict=True))
    return tuple(_finding(name, question, bool(failed.get(name))) for name, question in questions.items())


def _rejected(values: list[float]) -> list[bool]:
    """By Holm; one alone has nothing to share its 5 % with."""
    from statsmodels.stats.multitest import multipletests

    if len(values) < 2:
        return [value <= ALPHA for value in values]
    return [bool(rejected) for rejected in multipletests(values, alpha=ALPHA, method="holm")[0]]


def _known(estimate: Estimate) -> bool:
    return estimate.n > 0 and not math.isnan(estimate.error) and not estimate.missing


def _ends(question: Question) -> tuple[float, float]:
    """The range on the scale of the estimate."""
    low, high = question.allowed.at_least, question.allowed.at_most
    return (
        -math.inf if low is None else question.link(low),
        math.inf if high is None else question.link(high),
    )


def _outside(question: Question) -> float:
    """p-value of: the true figure lies inside the range."""
    low, high = _ends(question)
    sides = [question.estimate.below(low)] if low > -math.inf else []
    sides += [question.estimate.above(high)] if high < math.inf else []
    return min(1.0, len(sides) * min(sides))


def _finding(name: str, question: Question, failed: bool) -> Finding:
    estimate, back = question.estimate, question.back
    if not _known(estimate):
        return Finding(
            name=name,
            value=math.nan if estimate.n == 0 else back(estimate.value),
            low=math.nan,
            high=math.nan,
            allowed=question.allowed,
            verdict=INCONCLUSIVE if estimate.n else NOT_MEASURED,
            reason=_unknown(name, estimate),
            n=estimate.n,
            documents=estimate.documents,
        )
    low, high = estimate.interval(1 - 2 * ALPHA)
    least, most = _ends(question)
    inside = least <= low and high <= most
    verdict = PASS if inside else FAIL if failed else INCONCLUSIVE
    more = further(question) if verdict == INCONCLUSIVE else None
    words = name.replace("_", " ")
    value = f"{words} {back(estimate.value):.4g}, 90 % interval {back(low):.4g} to {back(high):.4g}, asked {question.allowed}"
    advice = ""
    if verdict == INCONCLUSIVE:
        advice = (
            f"; about {more:,} more {question.unit} would decide"
            if more
            else "; it lies on the limit, no number of samples decides"
        )
    return Finding(
        name=name,
        value=back(estimate.value),
        low=back(low),
        high=back(high),
        allowed=question.allowed,
        verdict=verdict,
        reason=value + advice,
        n=estimate.n,
        documents=estimate.documents,
        detectable=back(detectable(question)),
        more=more,
    )


def _unknown(name: str, estimate: Estimate) -> str:
    name = name.replace("_", " ")
    if estimate.missing:
        return f"{name}: {estimate.missing} of {estimate.n + estimate.missing} samples gave no number"
    if estimate.n == 0:
        return f"{name} was not measured"
    return f"{name} comes from one document; an interval takes two at least"


def _reach(estimate: Estimate) -> float:
    """Standard errors between what is asked about and a figure that is told from it four times in five."""
    from scipy.stats import norm, t

    return float(t.ppf(1 - ALPHA, estimate.freedom)) + float(norm.ppf(POWER))


def detectable(question: Question) -> float:
    """The smallest figure worse than the range that fails with a chance of 80 %, on the scale of the estimate."""
    low, high = _ends(question)
    reach = _reach(question.estimate) * question.estimate.error
    return high + reach if high < math.inf else low - reach


def further(question: Question) -> int | None:
    """More samples until the nearest answer is reached with a chance of 80 %, if the figure stays as it is and errors
    shrink with the root of the number of samples; None on the limit itself."""
    estimate = question.estimate
    gap = min(abs(estimate.value - end) for end in _ends(question))
    if gap == 0 or not math.isfinite(gap):
        return None
    needed = estimate.n * (_reach(estimate) * estimate.error / gap) ** 2
    return max(1, math.ceil(needed - estimate.n)) if needed < 1e9 else None
