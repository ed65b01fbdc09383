"""Whether two texts share passages: runs of eight words, hashed."""

import hashlib
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

WORDS = 8
"""Words of a run: short enough to survive an edit nearby, long enough not to be a phrase of the language."""
MOST = 1 << 16
"""Hashes that are kept, the smallest ones: half a megabyte."""
ALLOWED = 0.02
"""Share of runs that texts of one domain may have in common: headings, quotations, boilerplate."""

Hashes = NDArray[np.int64]


def fingerprint(texts: Iterable[str]) -> Hashes:
    """Ascending hashes of the runs of words in some texts, the smallest ``MOST`` of them."""
    hashes = {value for text in texts for value in _runs(text)}
    return np.sort(np.fromiter(hashes, dtype=np.int64, count=len(hashes)))[:MOST]


def overlap(texts: Iterable[str], known: Hashes) -> float:
    """Share of the runs of words in texts that are in a fingerprint.

    Where the fingerprint is full, runs with larger hashes than it holds do not count: the rest is a fair sample.
    """
    mine = fingerprint(texts)
    if len(known) == MOST:
        mine = mine[mine <= known[-1]]
    return float(np.isin(mine, known).mean()) if len(mine) else 0.0


def _runs(text: str) -> Iterable[int]:
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - WORDS + 1):
        run = " ".join(words[start : start + WORDS]).encode()
        yield int.from_bytes(hashlib.blake2b(run, digest_size=8).digest(), "little", signed=True)
