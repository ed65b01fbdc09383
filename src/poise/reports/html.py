"""A verdict as one page: no network, no scripts needed, a table behind every picture, light and dark, on paper too."""

import difflib
import math
import re
from itertools import pairwise

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from poise.core.metric import Score
from poise.core.verdict import Finding, Row, Verdict
from poise.reports.bars import Bars, bars
from poise.reports.figures import beside, human, interval, plain, span
from poise.reports.frontier import best_under, frontier, marks

PAGES = Environment(
    loader=PackageLoader("poise.reports", "templates"),
    undefined=StrictUndefined,
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters["score_of"] = lambda row, name: score_of(row, name)
LAYERS = 8
"""Matrices that a picture shows; the table behind it has all."""
WORDS = {"pass": "PASS", "fail": "FAIL", "inconclusive": "INCONCLUSIVE", "not measured": "not measured"}


def report_html(verdict: Verdict) -> str:
    """The whole page."""
    found = marks(verdict)
    return PAGES.get_template("report.html.jinja").render(
        verdict=verdict,
        marks=found,
        frontier=frontier(found),
        best_under=best_under(found),
        names=score_names(verdict),
        alike=alike(verdict),
        domains=_parts(verdict, "domain"),
        positions=_parts(verdict, "position"),
        layers=[(row.side.label, *_layers(row)) for row in verdict.rows if "layer" in row.parts],
        human=human,
        interval=interval,
        span=span,
        beside=beside,
        plain=plain,
        score_of=score_of,
        bar=bar,
        differences=differences,
        words=WORDS,
    )


def score_names(verdict: Verdict) -> list[str]:
    """Every figure that some candidate has, in their order."""
    names = [score.name for row in verdict.rows for score in (*row.scores, *row.side.scores)]
    return list(dict.fromkeys(names))


def score_of(row: Row, name: str) -> Score | None:
    """A figure of a candidate."""
    return next((score for score in (*row.scores, *row.side.scores) if score.name == name), None)


def alike(verdict: Verdict) -> list[tuple[str, list[tuple[str, str]]]]:
    """Neighbours in a figure whose 95 % intervals overlap: it cannot tell them apart."""
    found = []
    for name in score_names(verdict):
        scores = [(row.side.label, score) for row in verdict.rows if (score := score_of(row, name))]
        known = sorted(
            (pair for pair in scores if not math.isnan(pair[1].low)), key=lambda pair: pair[1].value
        )
        pairs = [(first, second) for (first, a), (second, b) in pairwise(known) if a.high >= b.low]
        if pairs:
            found.append((name, pairs))
    return found


def bar(finding: Finding) -> dict[str, float] | None:
    """Interval and range on one scale from 0 to 100, for a small picture beside the figures."""
    ends = [end for end in (finding.allowed.at_least, finding.allowed.at_most) if end is not None]
    points = [finding.low, finding.high, finding.value, *ends]
    if not all(map(math.isfinite, points)):
        return None
    pad = 0.15 * (max(points) - min(points)) or 1.0
    least, most = min(points) - pad, max(points) + pad

    def place(value: float) -> float:
        return 100 * (value - least) / (most - least)

    return {
        "low": place(finding.low),
        "high": place(finding.high),
        "value": place(finding.value),
        "inside": 0.0 if finding.allowed.at_least is None else place(finding.allowed.at_least),
        "outside": 100.0 if finding.allowed.at_most is None else place(finding.allowed.at_most),
    }


def differences(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts; words that the other does not have in that place are marked."""
    a, b = re.findall(r"\s+|\S+", before), re.findall(r"\s+|\S+", after)
    left, right = Markup(), Markup()
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        one, two = escape("".join(a[i:j])), escape("".join(b[k:m]))
        if kind == "equal":
            left, right = left + one, right + two
            continue
        left += Markup("<del>{}</del>").format(one) if one else Markup()
        right += Markup("<ins>{}</ins>").format(two) if two else Markup()
    return left, right


def _parts(verdict: Verdict, kind: str) -> tuple[Bars, list[tuple[str, list[float]]], list[str]] | None:
    """A picture, its table and the models in it; None where nobody has such parts."""
    rows = [row for row in verdict.rows if kind in row.parts]
    if not rows:
        return None
    names = list(dict.fromkeys(part.name for row in rows for part in row.parts[kind]))
    values = [{part.name: part.value for part in row.parts[kind]} for row in rows]
    table = [(name, [value.get(name, math.nan) for value in values]) for name in names]
    return bars(table), table, [row.side.label for row in rows]


def _layers(row: Row) -> tuple[Bars, list[tuple[str, float]]]:
    """The largest errors as a picture; all as a table."""
    errors = [(part.name, part.value) for part in row.parts["layer"]]
    largest = sorted(errors, key=lambda pair: -pair[1])[:LAYERS]
    return bars([(name.removesuffix(".weight")[-34:], [value]) for name, value in largest]), errors
