"""A verdict as files: verdict.json for programs and for rendering again, report.md and report.html for people."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from poise.core.artifact import write_atomically
from poise.core.comparison import Side
from poise.core.errors import UsageError
from poise.core.metric import Score
from poise.core.verdict import Answered, Finding, Part, Range, Row, Verdict
from poise.reports.card import TEMPLATES
from poise.reports.html import report_html
from poise.reports.report import no_nan

SCHEMA_VERSION = 1


def write_verdict(verdict: Verdict, folder: Path) -> None:
    """Writes ``verdict.json``, ``report.md`` and ``report.html`` into a folder, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "verdict.json", verdict_json(verdict))
    write_atomically(folder / "report.md", report_markdown(verdict))
    write_atomically(folder / "report.html", report_html(verdict))


def verdict_json(verdict: Verdict) -> str:
    """All of it; figures that were not measured are null."""
    data = {"schema_version": SCHEMA_VERSION, "verdict": verdict.verdict, **asdict(verdict)}
    for row, record in zip(verdict.rows, data["rows"], strict=True):
        record |= {"verdict": row.verdict, "reason": row.reason}
    return json.dumps(no_nan(data), indent=1) + "\n"


def read_verdict(path: Path) -> Verdict:
    """What ``verdict_json`` wrote.

    Raises:
        UsageError: the file is not a verdict of a known version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {data['schema_version']} is not {SCHEMA_VERSION}")
        return Verdict(
            original=_side(data["original"]),
            rows=tuple(_row(row) for row in data["rows"]),
            data=tuple(data["data"]),
            facts=data["facts"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a verdict of Poise ({error})") from error


def _row(data: dict[str, Any]) -> Row:
    return Row(
        side=_side(data["side"]),
        scores=tuple(_filled(Score, item) for item in data["scores"]),
        findings=tuple(
            _filled(Finding, {**item, "allowed": Range(**item["allowed"])}) for item in data["findings"]
        ),
        parts={name: tuple(_filled(Part, item) for item in items) for name, items in data["parts"].items()},
        answers=tuple(Answered(**item) for item in data["answers"]),
        notes=tuple(data["notes"]),
    )


def _side(data: dict[str, Any]) -> Side:
    return Side(**{**data, "scores": tuple(_filled(Score, item) for item in data["scores"])})


FIGURES = ("value", "low", "high", "detectable")
"""Fields that are null in JSON where they are NaN here."""


def _filled(kind: Any, item: dict[str, Any]) -> Any:
    found = {key: float("nan") if value is None and key in FIGURES else value for key, value in item.items()}
    return kind(**found | ({"rounds": tuple(item["rounds"])} if "rounds" in item else {}))


def report_markdown(verdict: Verdict) -> str:
    """Verdicts, findings and scores as tables."""
    return TEMPLATES.get_template("verdict.md.jinja").render(verdict=verdict)
