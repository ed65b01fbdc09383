"""Votes between pairs to one scale: how often each model would win against the original."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from poise.core.verdict import Strength

DRAWS = 500
PRIOR = 0.5
"""Of a tie, for every pair that met: without it a model that always won would have an infinite strength."""


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One vote: 1 for the first, 0 for the second, 0.5 for a tie."""

    first: str
    second: str
    score: float
    document: str


def strengths(votes: Sequence[Vote], base: str, seed: int = 0) -> list[Strength]:
    """Bradley and Terry 1952: P(first wins) = 1 / (1 + exp(b - a)); ties count half. Whole documents are drawn again.

    Args:
        base: the model that others are held against.
    """
    names = sorted({name for vote in votes for name in (vote.first, vote.second)} - {base})
    if not names:
        return []
    documents = sorted({vote.document for vote in votes})
    place = np.array([documents.index(vote.document) for vote in votes])
    value = _fit(votes, np.ones(len(votes)), names, base)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(documents), np.full(len(documents), 1 / len(documents)), size=DRAWS)
    drawn = np.array([_fit(votes, draw[place].astype(float), names, base) for draw in draws])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    counts = [sum(name in (vote.first, vote.second) for vote in votes) for name in names]
    return [
        Strength(name=name, value=float(v), low=float(a), high=float(b), votes=n)
        for name, v, a, b, n in zip(names, value, low, high, counts, strict=True)
    ]


def _fit(votes: Sequence[Vote], weights: np.ndarray, names: list[str], base: str) -> np.ndarray:
    """Chances of winning against the base, by Newton's method (statsmodels' binomial GLM)."""
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.generalized_linear_model import GLM

    pairs: dict[tuple[str, str], list[float]] = {}
    for vote, weight in zip(votes, weights, strict=True):
        key = (min(vote.first, vote.second), max(vote.first, vote.second))
        won = pairs.setdefault(key, [PRIOR / 2, PRIOR / 2])
        score = vote.score if vote.first == key[0] else 1 - vote.score
        won[0] += weight * score
        won[1] += weight * (1 - score)
    column = {name: number for number, name in enumerate(names)}
    design = np.zeros((len(pairs), len(names)))
    for number, (first, second) in enumerate(pairs):
        for name, sign in ((first, 1.0), (second, -1.0)):
            if name != base:
                design[number, column[name]] = sign
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # as many pairs as models are fitted exactly, which it takes for a mistake
        fitted = GLM(np.array([*pairs.values()]), design, family=Binomial()).fit()
    found: np.ndarray = 1 / (1 + np.exp(-np.asarray(fitted.params)))
    return found
