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
        upper: U [n, n] float32 with H^-1 = U^T U, for the columns in that order.
        diagonal: of the damped H, [n], in the original order.
    """

    order: Tensor
    upper: Tensor
    diagonal: Tensor


def symmetric(hessian: Tensor) -> Tensor:
    """A Hessian in float64, exactly symmetric.

    Raises:
        FormatError: it is not finite.
    """
    wide = hessian.double()
    if not bool(torch.isfinite(wide).all()):
        raise FormatError("the Hessian of its inputs is not finite; are the calibration activations sound?")
    return (wide + wide.T) / 2


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H + damp mean(diag H) I; inputs that were always zero get a diagonal of their own, so that H has an inverse."""
    wide = symmetric(hessian)
    diagonal = wide.diagonal().clamp(min=0)
    mean = float(diagonal.mean())
    dead = diagonal == 0
    if bool(dead.all()):
        warnings.warn("all inputs were zero in calibration: columns count alike", PoiseWarning, stacklevel=2)
        return torch.eye(len(wide), dtype=torch.float64)
    if bool(dead.any()):
        warnings.warn(
            f"{int(dead.sum())} of {len(dead)} inputs were always zero in calibration: their columns are rounded "
            "to nearest",
            PoiseWarning,
            stacklevel=2,
        )
    wide.diagonal().add_(damp * mean + dead * mean)
    return wide


def factorize(hessian: Tensor, *, damp: float, width: int = 1, act_order: bool = True) -> Factor:
    """Upper Cholesky factor of the inverse (Frantar et al. 2022, GPTQ, section 3.3, step 3).

    Args:
        hessian: [n, n], symmetric, positive semi-definite but for rounding.
        damp: added to the diagonal, as a share of its mean.
        width: columns that are rounded together.
        act_order: whether units of large diagonal come first.

    Raises:
        FormatError: not finite.
    """
    wide = damped(hessian, damp)
    n = len(wide)
    diagonal = wide.diagonal().clone()
    order = torch.arange(n)
    if act_order:
        units = torch.argsort(diagonal.view(-1, width).sum(1), descending=True, stable=True)
        order = order.view(-1, width)[units].flatten()
        wide = wide[order][:, order]
    mean = float(diagonal.mean())
    extra = 0.0
    for attempt in range(RETRIES):
        # H^-1 = U^T U where H = L L^T in reversed order: one factorization and one triangular inverse.
        lower, failed = torch.linalg.cholesky_ex(wide.flip(0, 1))
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
    identity = torch.eye(n, dtype=torch.float64)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return Factor(order=order, upper=upper.float().contiguous(), diagonal=diagonal.float())
