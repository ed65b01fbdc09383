"""Which of many texts to calibrate on: no doubles, near to a domain, and spread over what the model tells apart.

Texts are points: mean hidden states, centred, in units of their root mean square length. (Representativeness and diversity
in activation space matter more than where a text comes from: He et al. 2025, COLA, arXiv 2510.10618.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.calibration.overlap import Hashes, fingerprint, overlap
from poise.core.errors import UsageError

DOUBLE = 0.5
"""Share of the runs of words in an earlier text from which on a text is a double."""
NEAR = 2
"""With a domain, so many times as many texts as are wanted compete: the nearest ones."""
DRAWS = 20
"""Random choices that coverage is compared with."""

METHODS = ("coverage", "cluster", "random")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A chosen text: its number among the candidates, and why."""

    index: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Distances of all candidates to the nearest chosen one; 1.4 is that of two typical texts."""

    mean: float
    p95: float
    largest: float


def doubles(texts: Sequence[str]) -> dict[int, int]:
    """Number of a text -> number of the earlier text that holds at least half of its runs of words, or all of its words."""
    found: dict[int, int] = {}
    kept: list[tuple[int, tuple[Hashes, str]]] = []
    for number, text in enumerate(texts):
        hashes = fingerprint([text])
        words = " ".join(text.lower().split())
        for other, (before, said) in kept:
            if words == said or (len(hashes) and overlap([text], before) >= DOUBLE):
                found[number] = other
                break
        else:
            kept.append((number, (hashes, words)))
    return found


def points(states: Tensor) -> Tensor:
    """Mean hidden states [texts, hidden] as points: centred, of root mean square length one."""
    centred = states.double() - states.double().mean(0)
    return centred / centred.square().sum(1).mean().sqrt().clamp(min=1e-12)


def select(
    states: Tensor, count: int, *, method: str = "coverage", domain: Tensor | None = None, seed: int = 0
) -> list[Choice]:
    """Chooses texts.

    Args:
        states: mean hidden states of the candidates, [texts, hidden].
        count: texts that are wanted; all, if there are no more.
        method: ``coverage``: each the farthest from those before (k-center, Gonzalez 1985); ``cluster``: the middle of each
            of as many clusters (k-means++); ``random``.
        domain: states of sample texts, [samples, hidden]: only the candidates nearest to any of them compete.
        seed: of ``cluster`` and ``random``.

    Raises:
        UsageError: an unknown method, or nothing wanted.
    """
    if method not in METHODS or count < 1:
        raise UsageError(
            f"method is {', '.join(METHODS)}, and at least one text is wanted; got {method!r}, {count}"
        )
    pool, why = torch.arange(len(states)), ""
    both = states if domain is None else torch.cat((states, domain))
    x = points(both)
    if domain is not None:
        near = torch.cdist(x[: len(states)], x[len(states) :]).amin(1)
        pool = near.argsort(stable=True)[: NEAR * count].sort().values
        why = "near to the domain; "
    x = x[: len(states)]
    count = min(count, len(pool))
    dice = torch.Generator().manual_seed(seed)
    if method == "random":
        picked = [(int(pool[i]), "at random") for i in torch.randperm(len(pool), generator=dice)[:count]]
    elif method == "coverage":
        picked = _farthest_first(x, pool, count)
    else:
        picked = _middles(x, pool, count, dice)
    return [Choice(index=index, reason=why + reason) for index, reason in picked]


def _farthest_first(x: Tensor, pool: Tensor, count: int) -> list[tuple[int, str]]:
    """The one nearest to the mean of all, then each time the farthest from those chosen; ties to the smaller point."""
    inside = x[pool]
    first = int((inside - inside.mean(0)).norm(dim=1).argmin())
    picked = [(int(pool[first]), "in the middle of all")]
    distance = (inside - inside[first]).norm(dim=1)
    while len(picked) < count:
        distance[[int((pool == index).nonzero()) for index, _ in picked]] = -1
        here = int(distance.argmax())
        picked.append((int(pool[here]), f"{float(distance[here]):.2f} from the nearest chosen before"))
        distance = torch.minimum(distance, (inside - inside[here]).norm(dim=1))
    return picked


def _middles(x: Tensor, pool: Tensor, count: int, dice: torch.Generator) -> list[tuple[int, str]]:
    """k-means++ with as many clusters as texts are wanted; of each the point nearest to its mean."""
    inside = x[pool]
    centres = [inside[int(torch.randint(len(inside), (1,), generator=dice))]]
    while len(centres) < count:
        distance = torch.cdist(inside, torch.stack(centres)).amin(1).square()
        weights = distance if float(distance.sum()) > 0 else torch.ones_like(distance)
        centres.append(inside[int(torch.multinomial(weights, 1, generator=dice))])
    middle = torch.stack(centres)
    for _ in range(20):
        owner = torch.cdist(inside, middle).argmin(1)
        for cluster in torch.unique(owner):
            middle[cluster] = inside[owner == cluster].mean(0)
    owner = torch.cdist(inside, middle).argmin(1)
    picked: list[tuple[int, str]] = []
    taken: set[int] = set()
    for cluster in range(count):
        members = (owner == cluster).nonzero().flatten()
        order = (inside - middle[cluster]).norm(dim=1).argsort(stable=True)
        here = next(int(i) for i in order if int(i) not in taken)
        taken.add(here)
        picked.append((int(pool[here]), f"middle of a cluster of {len(members)}"))
    return picked


def coverage(states: Tensor, chosen: Sequence[int]) -> Coverage:
    """How far candidates are from what was chosen."""
    x = points(states)
    distance = torch.cdist(x, x[list(chosen)]).amin(1)
    return Coverage(
        mean=float(distance.mean()), p95=float(distance.quantile(0.95)), largest=float(distance.max())
    )


def random_coverage(states: Tensor, count: int) -> Coverage:
    """The same for random choices of as many, on average."""
    found = []
    for seed in range(DRAWS):
        picked = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))[:count]
        found.append(coverage(states, picked.tolist()))
    return Coverage(
        mean=sum(item.mean for item in found) / DRAWS,
        p95=sum(item.p95 for item in found) / DRAWS,
        largest=sum(item.largest for item in found) / DRAWS,
    )
