"""What solvers that learn to round have in common: where they begin, and that no row ends worse than it began."""

import warnings

import torch
from torch import Tensor

from poise.core.errors import PoiseWarning
from poise.core.format import Format, Params, QTensor
from poise.core.hessian import damped
from poise.core.registry import spec_of
from poise.core.stats import Stats


def learnable(format: Format, stats: Stats | None, damp: float) -> tuple[Tensor | None, Tensor | None]:
    """Importance of columns, and the damped Hessian; None where there is nothing to learn from or between."""
    if stats is None:
        return None, None
    importance = stats.second_moment.float()
    if stats.hessian is None:
        return importance, None
    if format.alphabet is None:
        warnings.warn(
            f"{spec_of(format)} is not scalar: its rounding cannot be learned, codes stay as they were",
            PoiseWarning,
            stacklevel=2,
        )
        return importance, None
    return importance, damped(stats.hessian.float(), damp)


def starting(
    weight: Tensor, format: Format, importance: Tensor | None, start: QTensor | None, noise: Tensor | None
) -> tuple[Tensor, Params]:
    """Given codes and parameters, or those of ``search``."""
    if start is not None:
        return start.codes, start.params
    params = format.fit(weight, importance)
    return format.round(weight, params, importance, noise), params


def better_rows(
    weight: Tensor,
    format: Format,
    hessian: Tensor,
    old: tuple[Tensor, Params],
    new: tuple[Tensor, Params],
) -> tuple[Tensor, Params]:
    """Of two solutions, which differ in codes and linear parameters alone, the better one for every row."""
    fell = loss(weight, format, hessian, *new) < loss(weight, format, hessian, *old)
    line = fell.unsqueeze(1)
    params = {
        key: torch.where(line, new[1][key], value) if key in format.linear else value
        for key, value in old[1].items()
    }
    return torch.where(line, new[0], old[0]), params


def loss(weight: Tensor, format: Format, hessian: Tensor, codes: Tensor, params: Params) -> Tensor:
    """Squared error of every row under the Hessian, [rows]."""
    lost = weight - format.decode(codes, params)
    return ((lost @ hessian) * lost).sum(1)
