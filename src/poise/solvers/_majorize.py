"""Descent under the full Hessian for formats that have no columns to go through."""

import torch
from torch import Tensor

from poise.core.format import Format, Params


def majorize(
    weight: Tensor, format: Format, codes: Tensor, params: Params, hessian: Tensor, steps: int
) -> tuple[Tensor, Params]:
    """Descent for formats that round whole rows: each step fits them to where a separable bound of the objective is least.

    With D_jj = sum_i |H_ij|, D - H is positive semi-definite, so the objective is at most that of rounding
    w' + (w - w') H D^-1 in the metric D, plus a constant (Lange 2016, MM Optimization Algorithms, section 4.4). A step
    that does not lower the objective, as a fit that is no exact minimum may not, ends it.
    """
    metric = hessian.abs().sum(1)
    lost = weight - format.decode(codes, params)
    least = float(((lost @ hessian) * lost).sum())
    for _ in range(steps):
        wish = (weight - lost) + (lost @ hessian) / metric.clamp(min=torch.finfo(torch.float32).tiny)
        trial = format.fit(wish, metric)
        found = format.round(wish, trial, metric)
        left = weight - format.decode(found, trial)
        now = float(((left @ hessian) * left).sum())
        if now >= least:
            break
        codes, params, lost, least = found, trial, left, now
    return codes, params
