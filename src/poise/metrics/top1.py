"""How often both models would choose the same next token."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from poise.core.metric import LogitMetric


class Top1(LogitMetric):
    """Share of positions whose most likely token is the same."""

    unit: ClassVar[str] = "share"
    protocol: ClassVar[str] = "same most likely token, full vocabulary"
    lower_is_better: ClassVar[bool] = False

    def values(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> Tensor:
        same = (reference.argmax(-1) == candidate.argmax(-1)).float()
        broken = reference.sum(-1).isnan() | candidate.sum(-1).isnan()  # argmax would choose the first NaN
        return torch.where(broken, math.nan, same)
