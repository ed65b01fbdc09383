"""Stochastic rounding to ascending levels."""

import torch
from torch import Tensor

from poise.formats._search import Floats


def by_chance(levels: Floats, weight: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Numbers of the levels below or above weight / scale, the nearer one the likelier."""
    values = torch.from_numpy(levels)
    t = weight / torch.where(scale == 0, torch.inf, scale)
    lower = (torch.searchsorted(values, t.contiguous(), right=True) - 1).clamp(0, len(values) - 2)
    share = (t - values[lower]) / (values[lower + 1] - values[lower])
    return (lower + (noise < share)).to(torch.uint8)
