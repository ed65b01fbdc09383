"""Products of two matrices of signs between diagonals, W ~ diag(h) U diag(l) V^T diag(g), of small squared error.

W is [n, m], U [n, R] and V [m, R] of -1 and 1, h [n, 1], l [R], g [m, 1]. First ADMM: U and V are free, and drawn to
signs times magnitudes of rank one (NanoQuant's LB-ADMM; the magnitudes are Dual-SVID's, of LittleBit). Then every part is
refined for the rest: signs by flipping while it helps, l, h and g by least squares; none makes the error larger.

``descend`` goes on under a Hessian of the inputs, which ties the rows of V together.

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
BLOCK = 64
"""Rows whose flips the others hear of together, where a Hessian ties them."""
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
    l = _middle(w, u * h, v * g)  # noqa: E741
    for _ in range(ROUNDS):
        u, h = _side(w, u, h, v * g * l)
        v, g = _side(w.t(), v, g, u * h * l)
        l = _middle(w, u * h, v * g)  # noqa: E741
    u, h = _side(w, u, h, v * g * l)
    return Factors(u, v, h, l, g)


def descend(w: Tensor, factors: Factors, hessian: Tensor) -> Factors:
    """One round of refinement for tr (W - W') H (W - W')^T; rounding aside, it does not rise.

    Args:
        hessian: [m, m], positive definite.
    """
    u, v, h, l, g = factors  # noqa: E741
    read = w @ hessian
    u, h = _side(read, u, h, v * g * l, hessian)
    v, g = _columns(read, v, g, u * h * l, hessian)
    return Factors(u, v, h, _middle(read, u * h, v * g, hessian), g)


def nearest_signs(
    w: Tensor, h: Tensor, other: Tensor, start: Tensor | None = None, hessian: Tensor | None = None
) -> Tensor:
    """Signs u [n, R] of small |w - diag(h) u other^T|^2, from which no single flip leads lower.

    Args:
        w: with a Hessian, W H.
        other: [m, R].
        start: signs to begin with; without, those that ADMM draws the least squares to.
        hessian: [m, m], the metric of the error; None for equal columns.
    """
    gram, target = _gram(other, hessian), w @ other
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


def _columns(read: Tensor, v: Tensor, g: Tensor, p: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of the side that a Hessian ties together, row after row, then its magnitudes, for W' = p V^T diag(g).

    A flip in row j changes the error by 4 (g_j v_jr s_jr + g_j^2 H_jj gram_rr), s = H (W - W')^T p: that of ``_flip`` in
    units of the root of H_jj. Rows of other blocks hear of a block's flips together.

    Args:
        read: W H.
    """
    v, gram, target = v.clone(), p.t() @ p, read.t() @ p
    slope = target - hessian @ (v * g) @ gram
    roots = divisor(hessian.diagonal().sqrt())
    sizes = g[:, 0] * hessian.diagonal().sqrt()
    for first in range(0, len(v), BLOCK):
        last = min(first + BLOCK, len(v))
        told = torch.zeros(last - first, gram.shape[0])
        for j in range(first, last):
            own = slope[j] / roots[j]
            told[j - first] = own
            _flip(
                v[j : j + 1].numpy(), own.unsqueeze(0).numpy(), sizes[j : j + 1].numpy(), gram.numpy(), SWEEPS
            )
            told[j - first].sub_(own).div_(roots[j])
            slope[j + 1 : last].addr_(hessian[j + 1 : last, j], told[j - first], alpha=-1)
        slope[last:].addmm_(hessian[last:, first:last], told, alpha=-1)
    stiff = (v @ gram @ v.t()).mul_(hessian)
    return v, _solved(stiff, target.mul_(v).sum(1)).unsqueeze(1)


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


def _side(
    w: Tensor, u: Tensor, h: Tensor, other: Tensor, hessian: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One side's signs, then its magnitudes, for the other side as it is; with a Hessian, w is W H."""
    u = nearest_signs(w, h, other, u, hessian)
    along, power = (u * (w @ other)).sum(1), (u * (u @ _gram(other, hessian))).sum(1)
    return u, (along / divisor(power)).unsqueeze(1)


def _middle(w: Tensor, a: Tensor, b: Tensor, hessian: Tensor | None = None) -> Tensor:
    """l of least squares, W' = a diag(l) b^T: of the normal equations of R matrices of rank one; with a Hessian, w is W H."""
    gram = _gram(b, hessian).mul_(a.t() @ a)
    return _solved(gram, (w @ b).mul_(a).sum(0))


def _gram(b: Tensor, hessian: Tensor | None) -> Tensor:
    return b.t() @ (b if hessian is None else hessian @ b)


def _solved(gram: Tensor, target: Tensor) -> Tensor:
    """x of gram x = target, damped a little; gram is lost."""
    gram.diagonal().add_(DAMPING * float(gram.diagonal().mean()) + 1e-30)
    return torch.cholesky_solve(target.unsqueeze(1), torch.linalg.cholesky(gram, out=gram)).squeeze(1)
