"""Factors of Hessians: damped, permuted, in float64, with what was mended said aloud."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.errors import FormatError, PoiseWarning

RETRIES = 8
"""Damping grows tenfold until the factor exists: from 0.01 of the mean that is more than any rounding error needs."""
ROWS = 512
"""Of a matrix that are copied at a time: wide layers have no room for two."""


@dataclass(frozen=True)
class Factor:
    """What error feedback needs of a Hessian, in the order in which columns are rounded.

    Attributes:
        order: [n], the columns in that order; whole units of ``width`` stay together.
        upper: R [n, n] float32, upper triangular, with H = R R^T for the columns in that order.
    """

    order: Tensor
    upper: Tensor


def damping(hessian: Tensor, damp: float) -> Tensor:
    """What is added to the diagonal of H, [n] float64: ``damp`` of its mean; for inputs that were always zero its mean
    beside, so that H has an inverse and leaves their columns alone.

    Raises:
        FormatError: H is not finite.
    """
    diagonal = hessian.diagonal().double()
    if not bool(torch.isfinite(hessian.sum())) and not bool(torch.isfinite(hessian).all()):
        raise FormatError("the Hessian of its inputs is not finite; are the calibration activations sound?")
    mean = float(diagonal.clamp(min=0).mean())
    dead = diagonal <= 0
    if bool(dead.all()):
        warnings.warn("all inputs were zero in calibration: columns count alike", PoiseWarning, stacklevel=2)
        return torch.ones_like(diagonal)
    if bool(dead.any()):
        warnings.warn(
            f"{int(dead.sum())} of {len(dead)} inputs were always zero in calibration: their columns are rounded "
            "to nearest",
            PoiseWarning,
            stacklevel=2,
        )
    return damp * mean + dead * mean


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H with ``damping`` on its diagonal, in its own dtype."""
    copy = hessian.clone()
    copy.diagonal().add_(damping(hessian, damp).to(copy.dtype))
    return copy


def cholesky(hessian: Tensor, damp: float, order: Tensor | None = None) -> Tensor:
    """Lower Cholesky factor of the damped Hessian in float64, rows and columns in an order of one's own.

    Damping grows tenfold until there is a factor, which is said.

    Raises:
        FormatError: not finite, or there is no factor at all.
    """
    added = damping(hessian, damp)
    mean = float((hessian.diagonal().double() + added).mean())
    order = torch.arange(len(hessian)) if order is None else order
    extra, failed = 0.0, torch.empty((), dtype=torch.int32)
    for attempt in range(RETRIES):
        wide = _ordered(hessian, order)
        wide.diagonal().add_(added[order] + extra)
        # It is its own transpose, which lies as LAPACK wants it: the factor takes its place.
        torch.linalg.cholesky_ex(wide.T, out=(wide.T, failed))
        if int(failed) == 0:
            break
        extra += max(damp, 1e-3) * mean * 10**attempt
    else:
        raise FormatError("the Hessian of its inputs cannot be factorized, whatever is added to its diagonal")
    if extra:
        warnings.warn(
            f"ill-conditioned Hessian: {damp + extra / mean:.3g} of its mean diagonal was added instead of {damp:.3g}",
            PoiseWarning,
            stacklevel=2,
        )
    return wide.T


def _ordered(hessian: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in an order, float64, without a second copy."""
    wide = torch.empty(hessian.shape, dtype=torch.float64)
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        wide[start : start + ROWS] = hessian[rows].index_select(1, order)
    return wide


def factorize(hessian: Tensor, *, damp: float, width: int = 1, act_order: bool = True) -> Factor:
    """Upper Cholesky factor of the damped Hessian, columns in the order in which they are rounded.

    GPTQ takes the factor of the inverse, U with H^-1 = U^T U (Frantar et al. 2022, section 3.3, step 3); U = R^-1, and
    error feedback can be told by either (Chee et al. 2023, QuIP, arXiv 2307.13304, theorem 6), so nothing is inverted.

    Args:
        hessian: [n, n], symmetric, positive semi-definite but for rounding.
        damp: added to the diagonal, as a share of its mean.
        width: columns that are rounded together.
        act_order: whether units of large diagonal come first.

    Raises:
        FormatError: not finite.
    """
    n = len(hessian)
    order = torch.arange(n)
    if act_order:
        units = torch.argsort(hessian.diagonal().view(-1, width).sum(1), descending=True, stable=True)
        order = order.view(-1, width)[units].flatten()
    # R is the lower factor of H in reversed order, reversed.
    lower = cholesky(hessian, damp, order.flip(0))
    upper = torch.empty(n, n)
    for start in range(0, n, ROWS):
        rows = slice(start, min(n, start + ROWS))
        upper[n - rows.stop : n - rows.start] = lower[rows].float().flip(0, 1)
    return Factor(order=order, upper=upper)
