"""Bars side by side: a figure of several parts, for one or more models."""

import math
from dataclasses import dataclass

WIDTH, BAR, GAP, LABEL = 760, 16, 10, 240


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar, in pixels.

    Attributes:
        series: place of its model, which decides colour and pattern.
    """

    label: str
    text: str
    series: int
    y: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Bars:
    """The picture."""

    bars: list[Bar]
    names: list[tuple[float, str]]
    height: float
    width: int = WIDTH
    left: int = LABEL


def bars(figures: list[tuple[str, list[float]]]) -> Bars:
    """Horizontal bars: names with one value a model; lengths are linear from 0, what is no number has none."""
    most = (
        max((value for _, values in figures for value in values if math.isfinite(value)), default=1.0) or 1.0
    )
    room = WIDTH - LABEL - 90
    found, names, y = [], [], float(GAP)
    for name, values in figures:
        names.append((y + BAR * len(values) / 2 + 4, name))
        for series, value in enumerate(values):
            known = math.isfinite(value)
            found.append(
                Bar(
                    label=name,
                    text=f"{value:.3g}" if known else "not measured",
                    series=series,
                    y=y,
                    width=room * value / most if known else 0.0,
                )
            )
            y += BAR
        y += GAP
    return Bars(bars=found, names=names, height=y)
