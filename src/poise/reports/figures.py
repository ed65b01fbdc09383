"""Figures as people write them."""

import math

from poise.core.comparison import Side
from poise.core.metric import Score
from poise.core.verdict import Finding


def human(value: float, unit: str = "") -> str:
    """A figure with its unit."""
    if math.isnan(value):
        return "not measured"
    if unit == "bytes" and value < 1e5:
        return f"{value / 1e3:.1f} kB"
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    if unit == "seconds":
        return f"{value * 1e3:.2f} ms"
    return f"{value:.4g} {unit}".strip()


def interval(score: Score) -> str:
    """The 95 % interval; empty where none is known."""
    return "" if math.isnan(score.low) else f"{score.low:.4g} to {score.high:.4g}"


def ratio(value: float, to: float) -> float:
    """``value / to``; NaN when there is nothing to divide by."""
    return value / to if to else math.nan


def span(finding: Finding) -> str:
    """The 90 % interval; empty where none is known."""
    return "" if math.isnan(finding.low) else f"{finding.low:.4g} to {finding.high:.4g}"


def beside(side: Side, score: Score) -> str:
    """The same figure of another model; empty where it has none."""
    found = next((other for other in side.scores if other.name == score.name), None)
    return "" if found is None else plain(found)


def plain(score: Score) -> str:
    """The value; its unit only where it is scaled by it, because tables name units once."""
    return human(score.value, score.unit if score.unit in ("bytes", "seconds") else "")
