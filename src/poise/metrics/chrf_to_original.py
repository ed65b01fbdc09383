"""How much of the original's answer the candidate gives again."""

from typing import ClassVar

from poise.metrics.chrf import Chrf


class ChrfToOriginal(Chrf):
    """chrF against the original model's own answer."""

    against: ClassVar[str] = "original"
