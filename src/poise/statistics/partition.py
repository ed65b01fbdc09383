"""One partition of the samples into documents, that every interval of a run is drawn from.

Samples of one document resemble each other: windows of an article, questions on a passage. Intervals that take them for
independent are too short (Cameron, Gelbach and Miller 2008). Whole documents are drawn again, with replacement, and every
metric and both models see the same draws, so that what all find hard cancels.

A figure is a function of the means of columns: the perplexity is exp(nll / tokens), corpus BLEU a function of counts. A
sample is a row of these columns; missing figures are NaN and their rows do not count.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from poise.statistics.estimate import Estimate

Array = NDArray[np.float64]
DRAWS = 2000
"""Draws behind a standard error: it is known to 1.6 %."""
BLOCK = 250
"""Draws at a time. All of them are kept: 8 kB a document."""


class Partition:
    """Samples by document.

    Args:
        documents: the document of each sample, in any order; equal names are one document.
        seed: of the draws.
    """

    def __init__(self, documents: Sequence[str], seed: int = 0) -> None:
        self.names = sorted(set(documents))
        place = {name: number for number, name in enumerate(self.names)}
        self.of = np.array([place[name] for name in documents], dtype=np.int64)
        self._seed = seed

    @cached_property
    def _draws(self) -> NDArray[np.int32]:
        """How often each document is drawn, [DRAWS, documents]."""
        n = len(self.names)
        return (
            np.random.default_rng(self._seed).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.int32)
        )

    def subset(self, chosen: Sequence[int]) -> "Partition":
        """Of some of the samples, by their numbers."""
        return Partition([self.names[self.of[number]] for number in chosen], self._seed)

    def estimate(self, samples: Array, combine: Callable[[Array], Array], *, share: bool = False) -> Estimate:
        """The figure of all samples with its standard error.

        Args:
            samples: [n] or [n, columns], a row a sample in the order of the documents.
            combine: sums of columns, with the number of samples as a last column, [..., columns + 1], to figures [...]
                on a scale where errors are about normal, such as a logarithm for ratios.
            share: whether the figure is a mean of differences of yes and no. Where none, or nearly none, differ, the
                spread of the sample says nothing; the error is then at least that of Bonett and Price 2012, which adds
                one pair of each kind.
        """
        rows = samples.reshape(len(samples), -1)
        scored = np.isfinite(rows).all(1)
        rows = np.column_stack([rows, np.ones(len(rows))])[scored]
        n, missing = int(scored.sum()), int((~scored).sum())
        if n == 0:
            return Estimate(value=np.nan, error=np.nan, n=0, documents=0, missing=missing)
        sums = np.zeros((len(self.names), rows.shape[1]))
        np.add.at(sums, self.of[scored], rows)
        value = float(combine(sums.sum(0)))
        documents = int((sums[:, -1] > 0).sum())
        if documents < 2:
            return Estimate(value=value, error=np.nan, n=n, documents=documents, missing=missing)
        drawn = np.concatenate(
            [combine(self._draws[at : at + BLOCK] @ sums) for at in range(0, DRAWS, BLOCK)]
        )
        drawn = drawn[np.isfinite(drawn)]
        error = float(drawn.std(ddof=1) * np.sqrt(documents / (documents - 1)))
        if share:
            error = max(error, _least(rows[:, 0]))
        return Estimate(value=value, error=error, n=n, documents=documents, missing=missing)


def _least(differences: Array) -> float:
    """Standard error of a paired difference of shares after Bonett and Price 2012, equation 3."""
    n = len(differences)
    up, down = ((differences > 0).sum() + 1) / (n + 2), ((differences < 0).sum() + 1) / (n + 2)
    return float(np.sqrt((up + down - (up - down) ** 2) / (n + 2)))


def mean(sums: Array) -> Array:
    """The mean of one column."""
    found: Array = sums[..., 0] / sums[..., -1]
    return found


def log_mean_ratio(sums: Array) -> Array:
    """Logarithm of the mean of the second column over that of the first."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.log(sums[..., 1] / sums[..., 0])
    return found
