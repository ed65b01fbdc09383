"""BOF4, block-wise optimal float (Blumenberg et al. 2025, arXiv 2505.06653): levels of least squared error for
Gaussian weights that are divided by the largest of their block.

A block of I weights with largest magnitude m scales its error by m^2, and its other weights are normal, cut off at
m. The levels are the Lloyd-Max quantizer of the density that this gives to u = w / m,

    p(u) ~ integral of f_I(m) m^3 phi(m u) / (2 Phi(m) - 1) dm,    f_I(m) = 2 I phi(m) (2 Phi(m) - 1)^(I - 1),

with 0 and 1 held fixed: a zero and the largest weight are exact. The paper's signed normalization (BOF4-S) divides by
the largest weight with its sign, so that -1 need not be a level. Deviation: the density is integrated numerically,
where the paper runs expectation maximization on samples.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.formats._grid import Grid
from poise.formats._search import Floats


@dataclass(frozen=True, kw_only=True)
class Bof(Grid):
    """w = scale * v. ``bof4`` is ``bof(bits=4)``.

    Attributes:
        group: weights of a block, 16 to 256; the levels depend on it.
        signed: whether the scale carries the sign of the largest weight (BOF4-S), or -1 is a level too (BOF4).
    """

    bits: int = 4
    group: int = 64
    signed: bool = True
    scale: str = "auto"

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise UsageError(f"bof takes 2 to 8 bits, got {self.bits!r}")
        if not isinstance(self.group, int):
            raise UsageError(
                f"the levels of bof follow from the size of its groups: a number, got {self.group!r}"
            )
        self.check()

    def values(self) -> Tensor:
        return torch.from_numpy(block_optimal_levels(self.bits, self.group, self.signed))


Doubles = npt.NDArray[np.float64]

STEPS = 8001
"""Points of the density on [-1, 1]."""


@cache
def block_optimal_levels(bits: int, group: int, signed: bool) -> Floats:
    """Ascending levels, float32 [2^bits]."""
    u = np.linspace(-1, 1, STEPS)
    weight = _density(u, group)
    zero = 2 ** (bits - 1) - 1  # one more level on the side of 1: with the other split the error is larger
    pinned = {zero: 0.0, 2**bits - 1: 1.0} | ({} if signed else {0: -1.0})
    # Start from equal shares of the density's cube root, the asymptotically optimal spacing (Panter, Dite 1951).
    share = np.cumsum(np.cbrt(weight))
    wanted = np.concatenate((np.linspace(0, 0.5, zero + 2)[1:-1], np.linspace(0.5, 1, zero + 2)))
    free = np.interp(wanted, share / share[-1], u)
    first = np.concatenate(([0.0], np.cumsum(weight)))
    moment = np.concatenate(([0.0], np.cumsum(weight * u)))
    for _ in range(ROUNDS):
        for place, value in pinned.items():
            free[place] = value
        edges = np.searchsorted(u, (free[1:] + free[:-1]) / 2)
        low, high = np.concatenate(([0], edges)), np.concatenate((edges, [STEPS]))
        mass = first[high] - first[low]
        free = np.where(mass > 0, (moment[high] - moment[low]) / np.where(mass > 0, mass, 1), free)
    for place, value in pinned.items():
        free[place] = value
    return free.astype(np.float32)


ROUNDS = 3000
"""Lloyd's iterations; 8 bits settle last."""


def _density(u: Doubles, group: int) -> Doubles:
    """p(u) of the module's docstring, not normalized, [len(u)]."""
    m = torch.linspace(0.02, 8, 400, dtype=torch.float64)
    inside = torch.special.erf(m / 2**0.5)
    largest = torch.exp(-m * m / 2 + (group - 1) * inside.log())
    factor = (largest * m**3 / inside).numpy()
    normal = np.exp(-0.5 * np.square(np.outer(u, m.numpy())))
    density: Doubles = normal @ factor
    return density
