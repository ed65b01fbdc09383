"""How fast a model answers: time to first token, time per further token, tokens a second."""

from contextlib import ExitStack
from statistics import median
from typing import ClassVar

from poise.core.engine import Engine, Generation
from poise.core.metric import Score, Subject, SystemMetric

PROMPT = 64
GENERATED = 32
ROUNDS = 5


class Latency(SystemMetric):
    """One request at a time. All models are loaded, warmed up once, and then take turns (A B A B ...), so
    that a machine that slows down slows all of them. Medians over the rounds, with the range as interval."""

    unit: ClassVar[str] = "seconds"
    protocol: ClassVar[str] = (
        f"one stream, {PROMPT} tokens in, {GENERATED} out, greedy, 1 warm-up, median and range of {ROUNDS} "
        "interleaved rounds"
    )

    def measure(self, subjects: list[Subject]) -> list[list[Score]]:
        with ExitStack() as started:
            engines = [started.enter_context(subject.start()) for subject in subjects]
            rounds = [[_request(engine) for engine in engines] for _ in range(ROUNDS + 1)][1:]
        return [self._scores(subject, [r[i] for r in rounds]) for i, subject in enumerate(subjects)]

    def _scores(self, subject: Subject, made: list[Generation]) -> list[Score]:
        per_token = [(g.seconds[-1] - g.seconds[0]) / (len(g.seconds) - 1) for g in made]
        return [
            self._score("time_to_first_token", [g.seconds[0] for g in made], "seconds", subject),
            self._score("time_per_token", per_token, "seconds", subject),
            self._score("throughput", [len(g.tokens) / g.seconds[-1] for g in made], "tokens/s", subject),
        ]

    def _score(self, name: str, values: list[float], unit: str, subject: Subject) -> Score:
        return Score(
            name=name,
            value=median(values),
            low=min(values),
            high=max(values),
            unit=unit,
            protocol=f"{self.protocol}, engine {subject.engine}",
            n=len(values),
            rounds=tuple(values),
        )


def _request(engine: Engine) -> Generation:
    return engine.generate([token % 200 + 1 for token in range(PROMPT)], GENERATED)
