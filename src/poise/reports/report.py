"""A comparison as files: report.json for programs, report.md with a picture for people."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from poise.core.artifact import write_atomically
from poise.core.comparison import Comparison, Side
from poise.core.format import FormatFacts
from poise.reports.card import TEMPLATES
from poise.reports.figures import human
from poise.reports.picture import Point, quality_against_size

SCHEMA_VERSION = 1


def write_report(comparison: Comparison, folder: Path) -> None:
    """Writes ``report.json``, ``report.md`` and ``quality.svg`` into a folder, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", to_json(comparison))
    write_atomically(folder / "quality.svg", _picture(comparison))
    template = TEMPLATES.get_template("report.md.jinja")
    text = template.render(comparison=comparison, rows=figure_rows(comparison))
    write_atomically(folder / "report.md", text)


def to_json(comparison: Comparison) -> str:
    """The whole comparison; figures that were not measured are null."""
    data = {"schema_version": SCHEMA_VERSION, "passed": comparison.passed, **asdict(comparison)}
    for gate, record in zip(comparison.gates, data["gates"], strict=True):
        record["verdict"] = gate.verdict
    return json.dumps(no_nan(data), indent=1) + "\n"


def formats_json(rows: list[FormatFacts]) -> str:
    """Facts of number formats; an error that is zero, or was not measured, has no ratio."""
    return json.dumps(
        no_nan({"schema_version": SCHEMA_VERSION, "formats": [asdict(row) for row in rows]}), indent=1
    )


def sides_json(sides: list[Side]) -> str:
    """Measurements of several models side by side."""
    return json.dumps(
        no_nan({"schema_version": SCHEMA_VERSION, "models": [asdict(side) for side in sides]}), indent=1
    )


def figure_rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(figure, original, quantized) for tables."""
    names = dict.fromkeys(
        score.name for score in (*comparison.reference.scores, *comparison.candidate.scores)
    )
    found = [(name, _find(comparison.reference, name), _find(comparison.candidate, name)) for name in names]
    return [(name.replace("_", " "), before, after) for name, before, after in found]


def _find(side: Side, name: str) -> str:
    score = next((score for score in side.scores if score.name == name), None)
    return human(score.value, score.unit) if score else "not measured"


def no_nan(value: Any) -> Any:
    """The value as JSON has it: what is no number is null."""
    if isinstance(value, dict):
        return {key: no_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [no_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _picture(comparison: Comparison) -> str:
    sides = (comparison.reference, comparison.candidate)
    points = [
        Point(label=s.label, megabytes=s.value("size") / 1e6, quality=s.value("perplexity")) for s in sides
    ]
    return quality_against_size(points, "perplexity (lower is better)", comparison.text)
