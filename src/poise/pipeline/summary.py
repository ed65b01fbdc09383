"""Samples to figures: scores with intervals, questions for the verdict, parts by domain and position."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from poise.core.metric import Answer, AnswerMetric, Metric, Score
from poise.core.registry import get, names
from poise.core.verdict import Part, Range
from poise.pipeline.samples import Prompt, Window
from poise.pipeline.scoring import OWN, divergences, logit_metrics
from poise.statistics.estimate import Estimate
from poise.statistics.flips import flips
from poise.statistics.noninferiority import Question
from poise.statistics.partition import Partition, mean

Array = NDArray[np.float64]
EDGES = (0, 16, 64, 256, 1024, 1 << 30)
"""Positions of a window that are summed up together: the first ones have the least context."""
QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999, "kl_max": 1.0}
NOWHERE = Partition([])
LIMITS = {"share": (0.0, 1.0), "points": (0.0, 100.0)}
"""Units whose intervals end where values do."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What windows came to.

    Attributes:
        records: a record a window of ``score_pair``; empty where models cannot be compared token by token.
        alone: then, bits and bytes of the original and of the candidate.
    """

    windows: list[Window]
    records: list[dict[str, Any]]
    partition: Partition
    alone: list[tuple[dict[str, float], dict[str, float]]] = field(default_factory=list)

    def column(self, name: str, of: str = "sums") -> Array:
        """Sum and number of a metric's values, [windows, 2]."""
        per = logit_metrics()[name].per
        sizes = {
            "token": [record["positions"] for record in self.records],
            "byte": [record["bytes"] for record in self.records],
            "word": [len(window.text.split()) for window in self.windows],
        }
        sums = [record[of][name] for record in self.records]
        return np.array([sums, sizes[per]], dtype=np.float64).T

    def lines(self) -> Iterator[dict[str, Any]]:
        """For scores.jsonl."""
        for window, record in zip(self.windows, self.records, strict=False):
            means = {key: value / record["positions"] for key, value in record["sums"].items()}
            yield {
                "kind": "text",
                "sample": window.key,
                "document": window.document,
                "domain": window.domain,
                **means,
            }


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Right (1) and wrong (0) answers of a set of questions.

    Attributes:
        name: of the figure.
        samples: key and document of each question.
    """

    name: str
    protocol: str
    samples: list[tuple[str, str]]
    original: list[float]
    candidate: list[float]
    partition: Partition

    def lines(self) -> Iterator[dict[str, Any]]:
        """For scores.jsonl."""
        for (sample, document), a, b in zip(self.samples, self.original, self.candidate, strict=True):
            facts = {"kind": "choice", "task": self.name, "sample": sample, "document": document}
            yield {**facts, "original": a, "answer": b}


@dataclass(frozen=True, kw_only=True)
class Written:
    """Answers that both models wrote."""

    prompts: list[Prompt] = field(default_factory=list)
    original: list[Answer] = field(default_factory=list)
    candidate: list[Answer] = field(default_factory=list)
    partition: Partition = NOWHERE

    def lines(self) -> Iterator[dict[str, Any]]:
        """For scores.jsonl."""
        for prompt, a, b in zip(self.prompts, self.original, self.candidate, strict=True):
            yield {
                "kind": "answer",
                "sample": prompt.key,
                "document": prompt.document,
                "prompt": prompt.asked,
                "original": a.text,
                "answer": b.text,
            }

    def columns(self, metric: AnswerMetric, of: str) -> Array:
        """Rows of a metric for one model, [prompts, columns]."""
        answers: list[Answer] = getattr(self, of)
        rows = []
        following = [*answers[1:], *answers[:1]]
        for prompt, answer, first, after in zip(self.prompts, answers, self.original, following, strict=True):
            if metric.against == "wanted":
                rows.append(metric.columns(answer, Answer(text=str(prompt.wanted))))
            else:
                others = {"original": first, "next": after, "nothing": answer}
                rows.append(metric.columns(answer, others[metric.against]))
        return np.array(rows, dtype=np.float64)

    def asked_by(self, metric: AnswerMetric) -> "Written":
        """The prompts that a metric is about: without a wanted answer there is nothing to be wrong about."""
        if metric.against != "wanted":
            return self
        mine = [number for number, prompt in enumerate(self.prompts) if prompt.wanted is not None]
        return Written(
            prompts=[self.prompts[number] for number in mine],
            original=[self.original[number] for number in mine],
            candidate=[self.candidate[number] for number in mine],
            partition=self.partition.subset(mine),
        )

    def applies(self, metric: AnswerMetric) -> bool:
        """Whether there is anything to hold answers against."""
        return bool(self.prompts) and (
            metric.against != "wanted" or any(p.wanted is not None for p in self.prompts)
        )


def answer_metrics() -> dict[str, AnswerMetric]:
    """All, by name."""
    return {
        name: get("metric", name)()
        for name in names("metric")
        if issubclass(get("metric", name), AnswerMetric)
    }


def _key(name: str) -> str:
    return name.replace("-", "_")


def _ratio(sums: Array) -> Array:
    """Sum over number."""
    found: Array = sums[..., 0] / sums[..., 1]
    return found


def _combined(metric: AnswerMetric, sums: Array) -> Array:
    """A metric's score of sums whose last column is the number of answers."""
    found: Array = metric.combine(torch.from_numpy(sums[..., :-1]), torch.from_numpy(sums[..., -1])).numpy()
    return found


def _score(
    name: str, metric: type[Metric] | Metric, estimate: Estimate, back: Callable[[float], float] = float
) -> Score:
    least, most = LIMITS.get(metric.unit, (-math.inf, math.inf))
    low, high = map(back, estimate.interval(0.95, least, most))
    value = math.nan if estimate.n == 0 else back(estimate.value)
    return Score(
        name=_key(name),
        value=value,
        low=low,
        high=high,
        unit=metric.unit,
        protocol=metric.protocol,
        n=estimate.n,
        n_unscored=estimate.missing,
    )


def _of_text(reading: Reading, name: str, of: str = "sums") -> Score:
    metric = logit_metrics()[name]
    estimate = reading.partition.estimate(reading.column(name, of), _ratio)
    return _score(
        name, metric, estimate, lambda value: float(metric.combine(torch.tensor(value, dtype=torch.float64)))
    )


def _of_answers(written: Written, name: str, metric: AnswerMetric, of: str) -> Score:
    written = written.asked_by(metric)
    estimate = written.partition.estimate(written.columns(metric, of), lambda sums: _combined(metric, sums))
    return _score(name, metric, estimate)


def own_scores(reading: Reading, chosen: Sequence[Chosen], written: Written, of: str) -> tuple[Score, ...]:
    """Figures of one model: ``original`` or ``candidate``."""
    found = [
        _of_text(reading, name, "sums" if of == "candidate" else "original")
        for name in OWN
        if reading.records
    ]
    if reading.alone:
        rows = np.array(
            [[pair[of == "candidate"][key] for key in ("bits", "bytes")] for pair in reading.alone]
        )
        metric = get("metric", "bits-per-byte")
        found.append(_score("bits-per-byte", metric, reading.partition.estimate(rows, _ratio)))
    for item in chosen:
        estimate = item.partition.estimate(np.array(getattr(item, of)), mean)
        found.append(_share(item.name, item.protocol, estimate))
    for name, answers in answer_metrics().items():
        if written.applies(answers) and answers.against != "original":
            found.append(_of_answers(written, name, answers, of))
    return tuple(found)


def _share(name: str, protocol: str, estimate: Estimate) -> Score:
    low, high = estimate.interval(0.95, 0.0, 1.0)
    return Score(
        name=name, value=estimate.value, low=low, high=high, unit="share", protocol=protocol, n=estimate.n
    )


def fidelity_scores(
    reading: Reading, chosen: Sequence[Chosen], written: Written, noise: float
) -> tuple[Score, ...]:
    """Figures of the candidate against the original."""
    found: list[Score] = []
    if reading.records:
        found += [_of_text(reading, name) for name in logit_metrics() if name not in OWN]
        every = np.concatenate([divergences(record) for record in reading.records])
        protocol = "KL(reference || candidate), full vocabulary, over positions"
        for name, share in QUANTILES.items():
            value = float(np.quantile(every, share))
            found.append(Score(name=name, value=value, unit="nats", protocol=protocol, n=len(every)))
        floor_protocol = "mean KL of the original against itself, first windows"
        found.append(Score(name="kl_noise_floor", value=noise, unit="nats", protocol=floor_protocol))
    for item in chosen:
        found += _changes(item)
    for name, answers in answer_metrics().items():
        if written.applies(answers) and answers.against == "original":
            found.append(_of_answers(written, name, answers, "candidate"))
        if written.applies(answers) and answers.shifts:
            found.append(_shift(written, name, answers))
    return tuple(found)


def _shift(written: Written, name: str, metric: AnswerMetric) -> Score:
    """How far single answers moved, either way; of what is compared by quotients, the logarithm of theirs."""
    before, after = (
        _combined(metric, np.column_stack([rows, np.ones(len(rows))]))
        for rows in (written.columns(metric, "original"), written.columns(metric, "candidate"))
    )
    if metric.ratio:
        before, after = np.log(before), np.log(after)
    estimate = written.partition.estimate(np.abs(after - before), mean)
    low, high = estimate.interval(0.95, 0.0)
    return Score(
        name=f"{_key(name)}_shift",
        value=estimate.value,
        low=low,
        high=high,
        unit="nats" if metric.ratio else metric.unit,
        protocol=f"absolute change {'of the logarithm, ' if metric.ratio else ''}answer by answer, mean; {metric.protocol}",
        n=estimate.n,
        n_unscored=estimate.missing,
    )


def _changes(item: Chosen) -> list[Score]:
    """Flips in both directions, and what is left in percent."""
    changed = flips(item.original, item.candidate)
    words = f"{changed.lost} right to wrong, {changed.won} wrong to right; exact McNemar p {changed.p:.3g}"
    before, after = sum(item.original), sum(item.candidate)
    prefix = "" if item.name == "accuracy" else f"{item.name}_"
    return [
        Score(
            name=f"{prefix}flips",
            value=(changed.lost + changed.won) / changed.n,
            unit="share",
            protocol=f"of {changed.n} items: {words}",
            n=changed.n,
        ),
        Score(
            name=f"{prefix}recovery",
            value=100 * after / before if before else math.nan,
            unit="%",
            protocol="right answers over the original's",
            n=changed.n,
        ),
    ]


def questions(
    reading: Reading, chosen: Sequence[Chosen], written: Written, allowed: Mapping[str, Range]
) -> dict[str, Question]:
    """What is asked of the candidate: every figure that has a range and was measured."""
    found: dict[str, Question] = {}
    for name, metric in logit_metrics().items():
        if reading.records and name not in OWN and (key := _key(name)) in allowed:
            estimate = reading.partition.estimate(reading.column(name), _ratio)
            found[key] = Question(
                estimate=estimate, allowed=allowed[key], ratio=metric.unit == "ratio", unit="windows"
            )
    for item in chosen:
        limits = allowed.get(f"{item.name}_change", allowed["accuracy_change"])
        change = np.array(item.candidate) - np.array(item.original)
        estimate = item.partition.estimate(change, mean, share=True)
        found[f"{item.name}_change"] = Question(estimate=estimate, allowed=limits, unit="questions")
    for name, answers in answer_metrics().items():
        key = _key(name) + ("" if answers.against == "original" else "_ratio" if answers.ratio else "_change")
        if written.applies(answers) and key in allowed:
            found[key] = Question(
                estimate=_change(written, answers), allowed=allowed[key], ratio=answers.ratio, unit="prompts"
            )
    return found


def _change(written: Written, metric: AnswerMetric) -> Estimate:
    """The candidate's score less the original's, or the logarithm of their ratio; against the original's answers, the score
    itself."""
    written = written.asked_by(metric)
    candidate = written.columns(metric, "candidate")
    width = candidate.shape[1]
    if metric.against == "original":
        return written.partition.estimate(candidate, lambda sums: _combined(metric, sums))
    both = np.column_stack([written.columns(metric, "original"), candidate])
    differences = (candidate - both[:, :width])[:, 0]

    def change(sums: Array) -> Array:
        before, after = (
            _combined(metric, np.concatenate([part, sums[..., -1:]], -1))
            for part in (sums[..., :width], sums[..., width:-1])
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(after / before) if metric.ratio else after - before

    if _yes_or_no(both):
        return written.partition.estimate(differences, mean, share=True)
    return written.partition.estimate(both, change)


def _yes_or_no(values: Array) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def parts(reading: Reading) -> dict[str, tuple[Part, ...]]:
    """Divergence by domain and by position."""
    if not reading.records:
        return {}
    domains = []
    columns = reading.column("kl")
    for domain in dict.fromkeys(window.domain for window in reading.windows):
        mine = [number for number, window in enumerate(reading.windows) if window.domain == domain]
        partition = reading.partition.subset(mine)
        estimate = partition.estimate(columns[mine], _ratio)
        low, high = estimate.interval(0.95)
        domains.append(Part(name=domain, value=estimate.value, low=low, high=high, n=len(mine)))
    return {"domain": tuple(domains), "position": tuple(_positions(reading))}


def _positions(reading: Reading) -> Iterator[Part]:
    kl = [divergences(record) for record in reading.records]
    place = np.concatenate([np.arange(len(k)) + w.first for k, w in zip(kl, reading.windows, strict=True)])
    every = np.concatenate(kl)
    for low, high in pairwise(EDGES):
        mine = every[(place >= low) & (place < high)]
        if len(mine):
            last = min(high, int(place.max()) + 1)
            yield Part(name=f"{low + 1} to {last}", value=float(mine.mean()), n=len(mine))
