"""Whether the calibration text has reached every expert, and what is done about those that it has not.

A mixture of experts sends each token to a few of them. An expert that few tokens have reached has statistics that are
mostly chance. Experts of a layer do the same kind of work on the same hidden states, so what all of them read is a fair
guess of what one of them reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from poise.core.errors import PoiseError
from poise.core.stats import Stats


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Tokens that have reached the experts of a layer.

    Attributes:
        tokens: by expert.
        least: tokens below which an expert is starved.
    """

    tokens: Mapping[str, int]
    least: int

    @property
    def starved(self) -> dict[str, int]:
        """Experts that too few tokens have reached, fewest first."""
        few = {name: n for name, n in self.tokens.items() if n < self.least}
        return dict(sorted(few.items(), key=lambda item: (item[1], item[0])))

    def report(self) -> str:
        """One line for people; empty if every expert has enough."""
        if not self.starved:
            return ""
        named = ", ".join(f"{name} {n}" for name, n in self.starved.items())
        return (
            f"{len(self.starved)} of {len(self.tokens)} experts were reached by fewer than {self.least} tokens and also "
            f"count what all experts of their layer read: {named}"
        )


def pooled(stats: Mapping[str, Stats | None]) -> Stats:
    """What all experts of a layer read together: the mean over their tokens.

    Args:
        stats: by expert; None for one that no token has reached.

    Raises:
        PoiseError: no token has reached any of them.
    """
    found = [item for item in stats.values() if item is not None and item.n_tokens]
    if not found:
        names = ", ".join(stats)
        raise PoiseError(f"no token of the calibration text has reached an expert of {names}; give more text")
    total = sum(item.n_tokens for item in found)
    return _mixture([(item, item.n_tokens / total) for item in found], n_tokens=total)


def shrunk(own: Stats | None, pool: Stats, n0: int) -> Stats:
    """An expert's statistics, drawn towards those of its layer: w own + (1 - w) pool, w = n / (n + n0).

    n are the expert's own tokens. It is as if n0 tokens of the layer's average had reached the expert as well: the mean of a
    prior that is worth n0 tokens. ``n_tokens`` stays the expert's own.

    Args:
        own: None for an expert that no token has reached: it gets the pool.
        n0: what the pool is worth, in tokens; 0 leaves any statistics of the expert's own as they are.
    """
    if own is None or not own.n_tokens:
        return replace(pool, n_tokens=0)
    w = own.n_tokens / (own.n_tokens + n0)
    return _mixture([(own, w), (pool, 1 - w)], n_tokens=own.n_tokens)


def feed(
    stats: Mapping[str, Stats | None], *, least: int, n0: int | None = None
) -> tuple[dict[str, Stats], Coverage]:
    """Statistics of every expert of a layer, in which starved ones are shrunk towards the pool of all.

    Experts with ``least`` tokens or more keep their own, bit for bit.

    Args:
        stats: by expert; None for one that no token has reached.
        least: tokens below which an expert is starved; four an input make a Hessian that is known at all.
        n0: of ``shrunk``; None for what the expert lacks, ``least - n``, so that the pool fades out as n comes to least.

    Raises:
        PoiseError: no token has reached any of them.
    """
    coverage = Coverage(
        tokens={name: item.n_tokens if item else 0 for name, item in stats.items()}, least=least
    )
    kept = {name: item for name, item in stats.items() if item is not None and name not in coverage.starved}
    if len(kept) == len(stats):
        return kept, coverage
    pool = pooled(stats)
    filled = {
        name: kept.get(name) or shrunk(stats[name], pool, least - n if n0 is None else n0)
        for name, n in coverage.tokens.items()
    }
    return filled, coverage


def _mixture(parts: list[tuple[Stats, float]], n_tokens: int) -> Stats:
    """Of means, with weights that add up to one; a matrix that some part lacks is left out."""

    def mix(name: str) -> Tensor | None:
        total: Tensor | None = None
        for item, w in parts:
            value = getattr(item, name)
            if value is None:
                return None
            total = value * w if total is None else total.add_(value, alpha=w)
        return total

    moment = mix("second_moment")
    assert moment is not None  # all statistics have one
    notes = tuple(dict.fromkeys(note for item, _ in parts for note in item.notes))
    return Stats(
        second_moment=moment,
        n_tokens=n_tokens,
        data_hash=parts[0][0].data_hash,
        hessian=mix("hessian"),
        cross=mix("cross"),
        notes=notes,
    )
