"""How fast a model answers: time to first token, time per further token, tokens a second."""

import math
import time
from contextlib import ExitStack
from itertools import pairwise
from typing import ClassVar

import numpy as np

from poise.core.engine import Engine, Generation
from poise.core.metric import Score, Subject, SystemMetric

PROMPT = 64
GENERATED = 32
ROUNDS = 5
TOGETHER = (4, 16)
"""Streams at once, which take long: ``TURNS`` rounds."""
TURNS = 3
ENOUGH = 1000
"""Samples that a 99th percentile takes: ten lie above it."""


class Latency(SystemMetric):
    """One request at a time, then several at once. All models are loaded, warmed up once, and then take turns (A B A B ...), so
    that a machine that slows down slows all of them. Medians over the rounds, with the range as interval. Several streams are
    read and continued in one batch; all begin together, which a server's users do not."""

    unit: ClassVar[str] = "seconds"
    protocol: ClassVar[str] = (
        f"one stream, {PROMPT} tokens in, {GENERATED} out, greedy, 1 warm-up, median and range of interleaved rounds"
    )

    def measure(self, subjects: list[Subject]) -> list[list[Score]]:
        with ExitStack() as started:
            engines = [started.enter_context(subject.start()) for subject in subjects]
            rounds = [[_request(engine) for engine in engines] for _ in range(ROUNDS + 1)][1:]
            several = {
                n: [[_together(engine, n) for engine in engines] for _ in range(TURNS + 1)][1:]
                for n in TOGETHER
            }
        return [
            [
                *self._scores(subject, [r[i] for r in rounds]),
                *(self._several(n, [r[i] for r in found], subject) for n, found in several.items()),
            ]
            for i, subject in enumerate(subjects)
        ]

    def _scores(self, subject: Subject, made: list[Generation]) -> list[Score]:
        per_token = [(g.seconds[-1] - g.seconds[0]) / (len(g.seconds) - 1) for g in made]
        gaps = [after - before for g in made for before, after in pairwise(g.seconds)]
        return [
            *(self._percentile(share, gaps, subject) for share in (0.5, 0.95, 0.99)),
            self._score("time_to_first_token", [g.seconds[0] for g in made], "seconds", subject),
            self._score("time_per_token", per_token, "seconds", subject),
            self._score("throughput", [len(g.tokens) / g.seconds[-1] for g in made], "tokens/s", subject),
        ]

    def _several(self, n: int, speeds: list[float], subject: Subject) -> Score:
        protocol = self.protocol.replace("one stream", f"{n} streams in one batch")
        return Score.of_rounds(
            f"throughput_at_{n}", speeds, "tokens/s", f"{protocol}, engine {subject.engine}"
        )

    def _percentile(self, share: float, gaps: list[float], subject: Subject) -> Score:
        """Of the times between two tokens, with the interval that order statistics give without any assumption on how they are
        distributed (David and Nagaraja 2003, section 7.1). The 99th needs a thousand gaps: fewer hardly hold its neighbours."""
        name = f"inter_token_latency_p{round(100 * share)}"
        protocol = f"between two tokens, {self.protocol}, engine {subject.engine}"
        if share > 0.98 and len(gaps) < ENOUGH:
            reason = f"; refused: {len(gaps)} of the {ENOUGH} gaps that it takes"
            return Score(
                name=name,
                value=math.nan,
                unit="seconds",
                protocol=protocol + reason,
                n=0,
                n_unscored=len(gaps),
            )
        from scipy.stats import binom

        ordered = sorted(gaps)
        low, high = (int(binom.ppf(end, len(gaps), share)) for end in (0.025, 0.975))
        return Score(
            name=name,
            value=float(np.quantile(ordered, share)),
            low=ordered[max(0, low - 1)],
            high=ordered[min(len(ordered) - 1, high)],
            unit="seconds",
            protocol=protocol,
            n=len(gaps),
        )

    def _score(self, name: str, values: list[float], unit: str, subject: Subject) -> Score:
        return Score.of_rounds(name, values, unit, f"{self.protocol}, engine {subject.engine}")


def _prompt(stream: int = 0) -> list[int]:
    return [(token + 7 * stream) % 200 + 1 for token in range(PROMPT)]


def _request(engine: Engine) -> Generation:
    return engine.generate(_prompt(), GENERATED)


def _together(engine: Engine, n: int) -> float:
    """Tokens a second of all streams."""
    start = time.perf_counter()
    made = engine.generate_many([_prompt(stream) for stream in range(n)], GENERATED)
    return sum(map(len, made)) / (time.perf_counter() - start)
