"""A figure with its standard error, and what follows from it."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """On a scale where errors are about normal.

    Attributes:
        value, error: estimate and standard error; NaN where unknown.
        n, documents: samples, and the independent documents that they come from.
        missing: samples that gave no number.
    """

    value: float
    error: float
    n: int
    documents: int
    missing: int = 0

    @property
    def freedom(self) -> int:
        return max(1, self.documents - 1)

    def interval(self, level: float, least: float = -math.inf, most: float = math.inf) -> tuple[float, float]:
        """Two-sided, cut off where values end, by Student's t with as many degrees of freedom as there are documents, less one: percentiles of
        draws are too narrow for a few documents."""
        from scipy.stats import t

        half = float(t.ppf(0.5 + level / 2, self.freedom)) * self.error
        low, high = np.clip([self.value - half, self.value + half], least, most).tolist()
        return low, high

    def above(self, limit: float) -> float:
        """p-value of: the true figure is at most ``limit``."""
        from scipy.stats import t

        if math.isnan(self.error):
            return 1.0
        if self.error == 0:
            return 0.0 if self.value > limit else 1.0
        return float(t.sf((self.value - limit) / self.error, self.freedom))

    def below(self, limit: float) -> float:
        """p-value of: the true figure is at least ``limit``."""
        return Estimate(value=-self.value, error=self.error, n=self.n, documents=self.documents).above(-limit)
