"""Products of two matrices of signs between diagonals, W ~ diag(h) U diag(l) V^T diag(g), of small squared error.

W is [n, m], U [n, R] and V [m, R] of -1 and 1, h [n, 1], l [R], g [m, 1]. First ADMM: U and V are free, and drawn to
signs times magnitudes of rank one (NanoQuant's LB-ADMM; the magnitudes are Dual-SVID's, of LittleBit). Then every part is
refined for the rest: signs by flipping while it helps, l, h and g by least squares; none makes the error larger.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from poise.core.slabs import map_slabs
from poise.formats._compiled import fast

ADMM = 60
"""Rounds; 100 lower the error of Gaussian weights by half a percent."""
PULL = (0.2, 1.0)
"""First and last weight of the signs against the product's error, in units of the mean square of a factor."""
FIXED = 20
"""Rounds with one side fixed; at 2 bits a weight, 1 round ends with a fifth more error, 40 with the same."""
ROUNDS = 8
"""Of refinement; 8 more lower the error by half a percent."""
SWEEPS = 16
"""Over the signs of a row at most; most rows are settled after 4."""
DAMPING = 1e-4
"""Share of the mean diagonal that is added to it before solving."""


class Factors(NamedTuple):
    """W ~ diag(h) U diag(l) V^T diag(g)."""

    u: Tensor
    v: Tensor
    h: Tensor
    l: Tensor  # noqa: E741
    g: Tensor


def factorize(w: Tensor, rank: int) -> Factors:
    """Factors of small squared error, for w of a magnitude near one."""
    a, b = _admm(w, rank)
    (u, h, _), (v, g, _) = _svid(a), _svid(b)
    l = _middle(w, u, v, h, g)  # noqa: E741
    for _ in range(ROUNDS):
        u, h = _side(w, u, h, v * g * l)
        v, g = _side(w.t(), v, g, u * h * l)
        l = _middle(w, u, v, h, g)  # noqa: E741
    u, h = _side(w, u, h, v * g * l)
    return Factors(u, v, h, l, g)


def nearest_signs(w: Tensor, h: Tensor, other: Tensor, start: Tensor | None = None) -> Tensor:
    """Signs u [n, R] of small |w - diag(h) u other^T|^2, from which no single flip leads lower.

    Args:
        other: [m, R].
        start: signs to begin with; without, those that ADMM draws the least squares to.
    """
    gram = other.t() @ other
    target = w @ other
    u = _relaxed_signs(target / _divisor(h), gram) if start is None else start.clone()
    slope = target - (u * h) @ gram

    def flip(rows: slice) -> None:
        _flip(u[rows].numpy(), slope[rows].numpy(), h[rows, 0].numpy(), gram.numpy(), SWEEPS)

    if u.numel():
        map_slabs(flip, *u.shape)
    return u


@fast
def _flip(u: Any, slope: Any, h: Any, gram: Any, sweeps: Any) -> None:
    """Flips signs one by one while it lowers the error of their row; in place.

    With a = slope, <residual, column r of the other side>, a flip changes the error by
    4 (h u_r a_r + h^2 gram_rr).
    """
    n, rank = u.shape
    for i in range(n):
        for _ in range(sweeps):
            flips = 0
            for r in range(rank):
                signed, power = h[i] * u[i, r], h[i] * h[i] * gram[r, r]
                if signed * slope[i, r] + power < -1e-5 * power:  # more than rounding may feign
                    u[i, r] = -u[i, r]
                    flips += 1
                    for s in range(rank):
                        slope[i, s] += 2 * signed * gram[r, s]
            if flips == 0:
                break


def _relaxed_signs(target: Tensor, gram: Tensor) -> Tensor:
    """Signs near the real u of u gram = target, which is drawn to -1 and 1 by and by."""
    mean = float(gram.diagonal().mean())
    z, dual = torch.zeros_like(target), torch.zeros_like(target)
    for k in range(FIXED):
        pull = mean * k / FIXED
        u = _solve(gram, target + pull * (z - dual), pull)
        z = _sign(u + dual)
        dual += u - z
    return z


def _admm(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two real factors [n, R] and [m, R], near signs times magnitudes of rank one; their product is near w."""
    v = torch.randn(w.shape[1], rank, generator=torch.Generator().manual_seed(rank))
    zu, du = torch.zeros(len(w), rank), torch.zeros(len(w), rank)
    zv, dv = torch.zeros_like(v), torch.zeros_like(v)
    for k in range(ADMM):
        share = PULL[0] + (PULL[1] - PULL[0]) * k / ADMM
        u = _pulled(w, v, zu - du, share)
        zu = _project(u + du)
        du += u - zu
        v = _pulled(w.t(), u, zv - dv, share)
        zv = _project(v + dv)
        dv += v - zv
    return u + du, v + dv


def _pulled(w: Tensor, other: Tensor, goal: Tensor, share: float) -> Tensor:
    gram = other.t() @ other
    pull = share * float(gram.diagonal().mean())
    return _solve(gram, w @ other + pull * goal, pull)


def _solve(gram: Tensor, right: Tensor, pull: float) -> Tensor:
    """x of x (gram + pull) = right."""
    extra = pull + DAMPING * float(gram.diagonal().mean()) + 1e-30
    factor = torch.linalg.cholesky(gram + extra * torch.eye(len(gram)))
    return torch.cholesky_solve(right.t(), factor).t()


def _project(a: Tensor) -> Tensor:
    """Its signs, times the magnitudes of rank one that are nearest to its own."""
    sign, left, right = _svid(a)
    return sign * left * right


def _svid(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sign(a) and |a| ~ left right^T, [n, 1] and [R]: power iteration, whose limit is not negative."""
    size = a.abs()
    right = size.mean(0)
    for _ in range(4):
        left = size @ right
        left = left / left.norm().clamp(min=1e-30)
        right = left @ size
    return _sign(a), left.unsqueeze(1), right


def _divisor(values: Tensor) -> Tensor:
    """Replaces zeros by infinity: what is divided by it becomes zero."""
    return torch.where(values == 0, torch.inf, values)


def _sign(a: Tensor) -> Tensor:
    return torch.where(a < 0, -1.0, 1.0)


def _side(w: Tensor, u: Tensor, h: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """One side's signs, then its magnitudes, for the other side as it is."""
    u = nearest_signs(w, h, other, u)
    y = u @ other.t()
    power = y.square().sum(1, keepdim=True)
    return u, (w * y).sum(1, keepdim=True) / _divisor(power)


def _middle(w: Tensor, u: Tensor, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
    """l of least squares: of the normal equations of R matrices of rank one."""
    a, b = u * h, v * g
    gram = (a.t() @ a) * (b.t() @ b)
    return _solve(gram, ((w @ b) * a).sum(0, keepdim=True), 0.0)[0]
