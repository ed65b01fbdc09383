"""What the tests of formats measure."""

from poise.core.registry import build
from poise.core.stats import Stats


def solve(weight, spec, importance=None, **settings):
    """The weight as ``search`` quantizes it."""
    stats = None if importance is None else Stats(second_moment=importance, n_tokens=1, data_hash="")
    return build("solver", "search").solve(weight, build("format", spec), stats, **settings)


def error(weight, spec, importance=None):
    """Relative squared error, weighed by importance."""
    w = 1 if importance is None else importance.double()
    squared = (solve(weight, spec, importance).decode() - weight).double().square() * w
    return float(squared.sum() / (weight.double().square() * w).sum())
