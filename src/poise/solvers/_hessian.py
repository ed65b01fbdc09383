"""Factors of Hessians: damped, permuted, in float64, with what was mended said aloud."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.errors import FormatError, PoiseWarning

RETRIES = 8
"""Damping grows tenfold until the factor exists: from 0.01 of the mean that is more than any rounding error needs."""


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
    wide = (hessian if order is None else hessian.index_select(0, order).index_select(1, order)).double()
    wide.diagonal().add_(added if order is None else added[order])
    extra = 0.0
    for attempt in range(RETRIES):
        lower, failed = torch.linalg.cholesky_ex(wide)
        if int(failed) == 0:
            break
        step = max(damp, 1e-3) * mean * 10**attempt
        wide.diagonal().add_(step)
        extra += step
    else:
        raise FormatError("the Hessian of its inputs cannot be factorized, whatever is added to its diagonal")
    if extra:
        warnings.warn(
            f"ill-conditioned Hessian: {damp + extra / mean:.3g} of its mean diagonal was added instead of {damp:.3g}",
            PoiseWarning,
            stacklevel=2,
        )
    found: Tensor = lower
    return found


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
    return Factor(order=order, upper=lower.float().flip(0, 1))
