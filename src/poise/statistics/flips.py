"""Answers that changed: accuracy alone hides them, because right turns wrong as often as wrong turns right.

Source: Dutta et al. 2024, "Accuracy is not all you need".
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Of the same items.

    Attributes:
        lost, won: items that only the original, or only the candidate, has right.
        p: exact p-value of McNemar 1947: both directions are equally likely.
    """

    n: int
    lost: int
    won: int
    p: float


def flips(original: Sequence[float], candidate: Sequence[float]) -> Flips:
    """Counts changes between right (1) and wrong (0), item by item."""
    from statsmodels.stats.contingency_tables import mcnemar

    pairs = list(zip(original, candidate, strict=True))
    table = [[sum(a == x and b == y for a, b in pairs) for y in (1, 0)] for x in (1, 0)]
    lost, won = table[0][1], table[1][0]
    p = float(mcnemar(table, exact=True).pvalue) if lost + won else 1.0
    return Flips(n=len(pairs), lost=lost, won=won, p=p)
