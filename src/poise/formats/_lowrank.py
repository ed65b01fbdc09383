"""Products of two matrices of signs between diagonals, W ~ diag(h) U diag(l) V^T diag(g), of small squared error.

W is [n, m], U [n, R] and V [m, R] of -1 and 1, h [n, 1], l [R], g [m, 1]. First ADMM: U and V are free, and drawn to
signs times magnitudes of rank one (NanoQuant's LB-ADMM; the magnitudes are Dual-SVID's, of LittleBit). Then every part is
refined for the rest: signs by flipping while it helps, l, h and g by least squares; none makes the error larger.

Products are of whole matrices: those of slabs are rounded otherwise, and the signs would depend on the slabs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from poise.core.slabs import map_slabs
from poise.formats._scales import divisor
from poise.kernels import fast

ADMM = 60
"""Rounds; 100 lower the error of Gaussian weights by half a percent."""
PULL = (0.2, 1.0)
"""First and last weight of the signs against the product's error, in units of the mean square of a factor."""
FIXED, FIXED_PULL = 20, 0.5
"""Rounds with one side fixed, and the weight of the signs in them."""
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
    (h, _), (g, _) = _sizes(a), _sizes(b)
    u, v = _sign(a), _sign(b)
    del a, b
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
    gram, target = other.t() @ other, w @ other
    if start is None:
        pull = FIXED_PULL * float(gram.diagonal().mean())
        u = _relaxed_signs(target / divisor(h), _inverse(gram.clone(), pull), pull)
    else:
        u = start.clone()
    slope = target.sub_((u * h) @ gram)

    def flip(rows: slice) -> None:
        size = h[rows, 0].contiguous()
        _flip(u[rows].numpy(), slope[rows].numpy(), size.numpy(), gram.numpy(), SWEEPS)

    if u.numel():
        map_slabs(flip, *w.shape)
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


def _relaxed_signs(target: Tensor, inverse: Tensor, pull: float) -> Tensor:
    """Signs near the real u of u gram = target, which is drawn to -1 and 1 by and by.

    Args:
        inverse: of gram + pull.
    """
    z, dual = torch.zeros_like(target), torch.zeros_like(target)
    for _ in range(FIXED):
        u = (target + pull * (z - dual)) @ inverse
        z = _sign(u + dual)
        dual += u - z
    return z


def _admm(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two real factors [n, R] and [m, R], near signs times magnitudes of rank one; their product is near w.

    Kept of a side are its factor u and a = u + dual: what it is drawn to, z, is the projection of a.
    """
    u, a = torch.zeros(len(w), rank), torch.zeros(len(w), rank)
    v = torch.randn(w.shape[1], rank, generator=torch.Generator().manual_seed(rank))
    b = torch.zeros_like(v)
    for k in range(ADMM):
        share = PULL[0] + (PULL[1] - PULL[0]) * k / ADMM
        _pulled(w, v, u, a, share)
        _pulled(w.t(), u, v, b, share)
    return a, b


def _pulled(w: Tensor, other: Tensor, u: Tensor, a: Tensor, share: float) -> None:
    """One step of ADMM for one side, in place: u of least |w - u other^T|^2 + pull |u - z + dual|^2, then dual."""
    gram = other.t() @ other
    pull = share * float(gram.diagonal().mean())
    inverse = _inverse(gram, pull)
    del gram
    left, right = _sizes(a)
    z = _sign(a).mul_(left).mul_(right)
    goal = (w @ other).add_(z, alpha=2 * pull).sub_(a, alpha=pull)
    torch.mm(goal, inverse, out=u)
    a.add_(u).sub_(z)


def _inverse(gram: Tensor, pull: float) -> Tensor:
    """Of gram + pull, damped a little; gram is lost."""
    gram.diagonal().add_(pull + DAMPING * float(gram.diagonal().mean()) + 1e-30)
    return torch.cholesky_inverse(torch.linalg.cholesky(gram, out=gram))


def _sizes(a: Tensor) -> tuple[Tensor, Tensor]:
    """|a| ~ left right^T, [n, 1] and [R]: power iteration, whose limit is not negative (Dual-SVID)."""
    size = a.abs()
    right = size.mean(0)
    for _ in range(4):
        left = size @ right
        left = left / left.norm().clamp(min=1e-30)
        right = left @ size
    return left.unsqueeze(1), right


def _sign(a: Tensor) -> Tensor:
    return torch.where(a < 0, -1.0, 1.0)


def _side(w: Tensor, u: Tensor, h: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """One side's signs, then its magnitudes, for the other side as it is."""
    u = nearest_signs(w, h, other, u)
    along, power = (u * (w @ other)).sum(1), (u * (u @ (other.t() @ other))).sum(1)
    return u, (along / divisor(power)).unsqueeze(1)


def _middle(w: Tensor, u: Tensor, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
    """l of least squares: of the normal equations of R matrices of rank one."""
    b = v * g
    gram = b.t() @ b
    a = u * h
    gram.mul_(a.t() @ a)
    return _inverse(gram, 0.0) @ (w @ b).mul_(a).sum(0)
