"""A judge compares answers in both orders; its own controls decide whether anybody hears of it.

The controls are in the same run: the original against itself must come out even, and a model that is known to be damaged (every
matrix rounded to 2 bits) must lose. A judge that fails one gives no verdict.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.core.judge import Judge
from poise.core.metric import Answer, Score
from poise.core.verdict import Range
from poise.pipeline.cache import Cache
from poise.pipeline.progress import Progress
from poise.pipeline.samples import Prompt
from poise.statistics.noninferiority import Question
from poise.statistics.partition import Partition, mean

EVEN = 0.05
"""How far from one half the original may be from itself."""
DAMAGED = "int(bits=2, group=64, symmetric=False)"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Preferences for the second of two models, and how the judge behaved."""

    preference: NDArray[np.float64]
    longer: NDArray[np.float64]
    consistent: NDArray[np.float64]
    first: NDArray[np.float64]


def judge_answers(
    judge: Judge,
    prompts: Sequence[Prompt],
    before: Sequence[Answer],
    after: Sequence[Answer],
    cache: Cache,
    progress: Progress,
) -> Judged:
    """Both orders of every pair; what one order left open is unscored."""
    rows = []
    for number, (prompt, a, b) in enumerate(zip(prompts, before, after, strict=True), 1):
        key = f"{prompt.key} {a.text!r} {b.text!r}"
        if key not in cache:
            cache[key] = [
                judge.prefers_first(prompt.asked, *pair) for pair in ((a.text, b.text), (b.text, a.text))
            ]
        one, other = (math.nan if p is None else p for p in cache[key])
        length = math.log((len(b.text) + 1) / (len(a.text) + 1))
        same = (
            math.nan
            if math.isnan(one + other)
            else float((one < 0.5) == (other > 0.5) or one == other == 0.5)
        )
        rows.append([(1 - one + other) / 2, length, same, (one + other) / 2])
        progress("judge", number, len(prompts))
    columns = np.array(rows, dtype=np.float64).T
    return Judged(preference=columns[0], longer=columns[1], consistent=columns[2], first=columns[3])


def at_equal_length(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Preference where both answers are equally long: the regression of preferences on the logarithm of the lengths' ratio, read at
    zero. AlpacaEval 2 (Dubois et al. 2024) does the same with a logistic regression; preferences here are probabilities already.

    Args:
        sums: of preference p, length d, p d, d d, and the number of samples, [..., 5].
    """
    p, d, pd, dd = (sums[..., k] / sums[..., 4] for k in range(4))
    spread = dd - d * d
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(spread > 1e-12, (pd - p * d) / spread, 0.0)
    found: NDArray[np.float64] = p - slope * d
    return found


def controls(itself: Judged, damaged: Judged, partition: Partition) -> list[str]:
    """What speaks against the judge; nothing if it may be heard."""
    against = []
    even = partition.estimate(itself.preference, mean)
    if even.n == 0 or even.missing > even.n:
        return [f"it gave no answer to {even.missing} of {even.missing + even.n} pairs"]
    low, high = even.interval(0.95)
    if abs(even.value - 0.5) > EVEN and not low <= 0.5 <= high:
        against.append(f"it prefers one of two equal answers (win rate {even.value:.2f})")
    lost = partition.estimate(damaged.preference, mean)
    if not lost.n or lost.below(0.5) > 0.05:
        against.append(f"it does not see that a model of 2 bits is worse (win rate {lost.value:.2f})")
    return against


def judged_question(judged: Judged, partition: Partition, allowed: Range) -> Question:
    """The win rate at equal length as a figure that decides."""
    p, d = judged.preference, judged.longer
    estimate = partition.estimate(np.column_stack([p, d, p * d, d * d]), at_equal_length)
    return Question(estimate=estimate, allowed=allowed, unit="prompts")


def judged_scores(
    judge: Judge, judged: Judged, itself: Judged, damaged: Judged, partition: Partition
) -> list[Score]:
    """Win rates of candidate and controls, and what the judge's habits are."""
    protocol = f"judge {judge.name}, both orders, {judge.scale}"
    columns = np.column_stack(
        [judged.preference, judged.longer, judged.preference * judged.longer, judged.longer**2]
    )
    figures: list[tuple[str, Any, Any, str]] = [
        ("judged_win_rate", columns, at_equal_length, "at equal length; a half is as good as the original"),
        ("judged_win_rate_raw", judged.preference, mean, "whatever the length"),
        ("judged_consistency", judged.consistent, mean, "pairs where both orders agree"),
        (
            "judged_first",
            itself.first,
            mean,
            "control: preference for what comes first, original against itself",
        ),
        ("judged_damaged", damaged.preference, mean, "control: win rate of the original at 2 bits"),
    ]
    found = []
    for name, samples, combine, words in figures:
        estimate = partition.estimate(samples, combine)
        low, high = estimate.interval(0.95, 0.0, 1.0)
        found.append(
            Score(
                name=name,
                value=estimate.value,
                low=low,
                high=high,
                unit="share",
                protocol=f"{protocol}; {words}",
                n=estimate.n,
                n_unscored=estimate.missing,
            )
        )
    return found
