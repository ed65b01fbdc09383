"""Parts of a candidate's row that take no engine."""

import json
import math
from pathlib import Path

import numpy as np

from poise.core.comparison import Side
from poise.core.verdict import INCONCLUSIVE, Answered, Finding, Part, Range
from poise.pipeline.summary import Written
from poise.statistics.noninferiority import Question
from poise.statistics.partition import Partition, log_mean_ratio

SHOWN = 8
"""Answers that a report shows."""


def latency(original: Side, candidate: Side, allowed: Range) -> Question | None:
    """Time per token over the original's, in rounds where they took turns. Two engines cannot be compared this way: what differs
    is the engine."""
    pair = [
        next((s.rounds for s in side.scores if s.name == "time_per_token"), ())
        for side in (original, candidate)
    ]
    if original.engine.split("(")[0] != candidate.engine.split("(")[0] or not pair[0]:
        return None
    rounds = np.array(pair).T
    estimate = Partition([str(number) for number in range(len(rounds))]).estimate(rounds, log_mean_ratio)
    return Question(
        estimate=estimate,
        allowed=allowed,
        ratio=True,
        unit="rounds",
    )


def missing(names: set[str], allowed: dict[str, Range]) -> list[Finding]:
    """What was asked for and is not there: a candidate has not passed it."""
    return [
        Finding(
            name=name,
            value=math.nan,
            low=math.nan,
            high=math.nan,
            allowed=allowed[name],
            verdict=INCONCLUSIVE,
            reason=f"{name.replace('_', ' ')} was asked for and not measured",
        )
        for name in sorted(names)
    ]


def layers(source: str | Path) -> dict[str, tuple[Part, ...]]:
    """Errors of the matrices of an artifact, from the record of the run that made it, if that is still beside it."""
    record = Path(f"{source}.run.json")
    if not record.is_file():
        return {}
    matrices = json.loads(record.read_text(encoding="utf-8")).get("matrices", [])
    errors = [(item["name"], item.get("output_error")) for item in matrices]
    found = [
        Part(name=name, value=float(error))
        for name, error in errors
        if error is not None and math.isfinite(error)
    ]
    return {"layer": tuple(found)} if found else {}


def shown(written: Written) -> list[Answered]:
    """Answers that differ first: they are what a reader looks for."""
    rows = list(zip(written.prompts, written.original, written.candidate, strict=True))
    rows.sort(key=lambda row: row[1].text == row[2].text)
    return [
        Answered(prompt=prompt.asked, wanted=prompt.wanted, original=a.text, candidate=b.text)
        for prompt, a, b in rows[:SHOWN]
    ]
