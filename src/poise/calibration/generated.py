"""Text that a model writes itself: calibration without data.

The first tokens are drawn from almost flat distributions, so that texts differ; from there on the temperature falls to
one, so that they are what the model believes (Williams et al. 2025, Self-calibration for language model quantization and
pruning, section 3; Liu et al. 2023, LLM-QAT, arXiv 2305.17888, begin with a random token likewise). Where there is some
text, but too little, texts go on from its passages, so that they are of its domain.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Advance = Callable[[Tensor], Tensor]
"""Takes the newest tokens of all texts, [texts, n], and answers with the scores of the next ones, [texts, vocabulary]."""

TEXTS = 32
"""Texts that are written side by side."""
HOT = 2.0
"""Temperature of the first tokens."""
COOL = 8
"""Tokens after which it is one."""


def write_windows(
    begin: Callable[[], Advance],
    *,
    windows: int,
    length: int,
    opening: Sequence[int],
    passages: Sequence[Sequence[int]] = (),
    banned: Sequence[int],
    vocabulary: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[list[int]]:
    """Windows of exactly ``length`` tokens each.

    Args:
        begin: starts a batch of texts.
        opening: tokens that open a text; one at random follows.
        passages: what texts go on from instead, in turn; all of one length.
        banned: tokens that are never drawn: those that end or pad a text.
        vocabulary: how many tokens there are.
    """
    dice = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    while len(found) < windows:
        count = min(TEXTS, windows - len(found))
        advance = begin()
        if passages:
            own = [list(passages[(len(found) + text) % len(passages)]) for text in range(count)]
            texts = torch.tensor(own)
        else:
            texts = _random_openings(opening, banned, vocabulary, count, dice)
        new = texts
        while texts.shape[1] < length:
            scores = advance(new).float()
            scores[:, list(banned)] = -torch.inf
            made = COOL if passages else texts.shape[1] - len(opening)
            heat = max(1.0, HOT - (HOT - 1) * made / COOL)
            new = _draw(torch.softmax(scores / heat, -1), dice)
            texts = torch.cat((texts, new), dim=1)
            progress(len(found) * length + count * texts.shape[1], windows * length)
        found += texts[:, :length].tolist()
    return found


def _random_openings(
    opening: Sequence[int], banned: Sequence[int], vocabulary: int, count: int, dice: torch.Generator
) -> Tensor:
    """The opening and a random token, [count, n]."""
    allowed = torch.ones(vocabulary)
    allowed[list(banned)] = 0
    first = torch.multinomial(allowed.expand(count, -1), 1, generator=dice)
    return torch.cat((torch.tensor([list(opening)] * count, dtype=torch.long).view(count, -1), first), dim=1)


def _draw(shares: Tensor, dice: torch.Generator) -> Tensor:
    """One of each row's tokens, [rows, 1]: where a uniform number falls in their cumulative shares.

    (``torch.multinomial`` draws a number for every token of the vocabulary.)
    """
    below = shares.cumsum(-1, dtype=torch.float64)
    place = torch.rand((len(shares), 1), generator=dice, dtype=torch.float64) * below[:, -1:]
    return torch.searchsorted(below, place, right=True).clamp(max=shares.shape[1] - 1)
