"""Quality against size, as one SVG that needs nothing else and follows light or dark mode."""

import math
from typing import NamedTuple

from poise.reports.card import TEMPLATES

WIDTH, HEIGHT, MARGIN = 640, 360, 60


class Point(NamedTuple):
    """One model: its size on disk and a quality figure."""

    label: str
    megabytes: float
    quality: float


class _Placed(NamedTuple):
    x: float
    y: float
    anchor: str
    label: str
    megabytes: float
    quality: float


def quality_against_size(points: list[Point], quality: str, caption: str) -> str:
    """An SVG scatter plot with a title and a description for screen readers.

    Models without a figure are described, but have no place in the plot.
    """
    known = [point for point in points if math.isfinite(point.quality)]
    right = 1.15 * max(point.megabytes for point in points) or 1.0
    low = min((point.quality for point in known), default=0.0)
    high = max((point.quality for point in known), default=1.0)
    pad = max(0.25 * (high - low), 0.02 * abs(high)) or 1.0
    bottom, top = low - pad, high + pad
    placed = [_place(point, right, bottom, top) for point in known]
    return TEMPLATES.get_template("quality.svg.jinja").render(
        points=points,
        placed=placed,
        quality=quality,
        caption=caption,
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
        x_ticks=[(MARGIN + (WIDTH - 2 * MARGIN) * i / 4, right * i / 4) for i in range(5)],
        y_ticks=[
            (HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * i / 4, bottom + (top - bottom) * i / 4)
            for i in range(5)
        ],
    )


def _place(point: Point, right: float, bottom: float, top: float) -> _Placed:
    x = MARGIN + (WIDTH - 2 * MARGIN) * point.megabytes / right
    y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (point.quality - bottom) / (top - bottom)
    return _Placed(x, y, "end" if x > WIDTH / 2 else "start", *point)
