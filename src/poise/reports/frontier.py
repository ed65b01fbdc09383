"""What a size buys: divergence against bytes, with intervals and the candidates that no other beats in both."""

import math
from dataclasses import dataclass

from poise.core.verdict import Verdict

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 24, 58


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A candidate in the picture.

    Attributes:
        size: megabytes on disk.
        value, low, high: divergence from the original with its 95 % interval, nats a token.
        best: whether no candidate is both smaller and closer to the original.
    """

    label: str
    verdict: str
    size: float
    value: float
    low: float
    high: float
    best: bool


def marks(verdict: Verdict) -> list[Mark]:
    """Candidates whose divergence is known, by size."""
    rows = [(row, next((score for score in row.scores if score.name == "kl"), None)) for row in verdict.rows]
    known = [(row, score) for row, score in rows if score and math.isfinite(score.value)]
    sizes = [row.side.value("size") / 1e6 for row, _ in known]
    found = []
    for (row, score), size in zip(known, sizes, strict=True):
        beaten = any(
            other <= size and against.value <= score.value and (other, against.value) != (size, score.value)
            for (_, against), other in zip(known, sizes, strict=True)
        )
        found.append(
            Mark(
                label=row.side.label,
                verdict=row.verdict,
                size=size,
                value=score.value,
                low=score.value if math.isnan(score.low) else score.low,
                high=score.value if math.isnan(score.high) else score.high,
                best=not beaten,
            )
        )
    return sorted(found, key=lambda mark: (mark.size, mark.value))


def best_under(found: list[Mark]) -> list[tuple[float, Mark]]:
    """From how many megabytes on a candidate is the best that fits."""
    return [(mark.size, mark) for mark in found if mark.best]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A mark with its place in the picture, in pixels."""

    mark: Mark
    x: float
    y: float
    top: float
    bottom: float
    anchor: str
    below: bool


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The picture: places, axes and the line through the best."""

    placed: list[Placed]
    line: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def frontier(found: list[Mark]) -> Frontier:
    """Sizes on a linear axis from 0; divergences on a logarithmic one, because they span decades."""
    most = 1.12 * max((mark.size for mark in found), default=1.0)
    positive = [value for mark in found for value in (mark.value, mark.high, mark.low) if value > 0]
    floor = max(min(positive, default=1e-3), 1e-6)
    least = math.floor(math.log10(floor) * 2) / 2
    highest = max(math.ceil(math.log10(max(positive, default=1.0)) * 2) / 2, least + 0.5)

    def across(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * size / most

    def up(value: float) -> float:
        place = (math.log10(max(value, 10**least)) - least) / (highest - least)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * place

    placed = [
        Placed(
            mark=mark,
            x=across(mark.size),
            y=up(mark.value),
            top=up(mark.high),
            bottom=up(max(mark.low, 10**least)),
            anchor="end" if across(mark.size) > 0.72 * WIDTH else "start",
            below=up(mark.value) < TOP + 30,
        )
        for mark in found
    ]
    line = " ".join(f"{place.x:.1f},{place.y:.1f}" for place in placed if place.mark.best)
    step = 10 ** math.floor(math.log10(most / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (factor * step) <= 6)
    x_ticks = [(across(step * i), f"{step * i:g}") for i in range(int(most / step) + 1)]
    decades = [e + s for e in range(math.floor(least), math.ceil(highest) + 1) for s in (0.0, math.log10(3))]
    y_ticks = [
        (up(10**e), f"{float(f'{10**e:.0e}'):g}") for e in decades if least - 1e-9 <= e <= highest + 1e-9
    ]
    return Frontier(placed=placed, line=line, x_ticks=x_ticks, y_ticks=y_ticks)
