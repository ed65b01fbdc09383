"""How alike the answers of one model are."""

from typing import ClassVar

from poise.metrics.bleu import Bleu


class SelfBleu(Bleu):
    """BLEU of each answer against the same model's answer to the next prompt. Zhu et al. 2018 take all other answers as references,
    which costs the square of their number and grows with it."""

    protocol: ClassVar[str] = f"{Bleu.protocol}, each answer against the same model's next one"
    lower_is_better: ClassVar[bool] = True
    against: ClassVar[str] = "next"
    shifts: ClassVar[bool] = True
