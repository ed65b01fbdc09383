"""Figures as people write them."""

import math

from poise.core.metric import Score


def human(value: float, unit: str = "") -> str:
    """A figure with its unit."""
    if math.isnan(value):
        return "not measured"
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
