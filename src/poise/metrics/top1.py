"""How often both models would choose the same next token."""

import math
from typing import ClassVar

from torch import Tensor

from poise.core.metric import LogitMetric


class Top1(LogitMetric):
    """Share of positions whose most likely token is the same."""

    unit: ClassVar[str] = "share"
    protocol: ClassVar[str] = "same most likely token, full vocabulary"
    lower_is_better: ClassVar[bool] = False

    def sample(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> float:
        if bool(reference.isnan().any()) or bool(candidate.isnan().any()):
            return math.nan  # argmax would choose the first NaN
        return float((reference.argmax(-1) == candidate.argmax(-1)).double().mean())
