"""Rouge2 of generated answers against wanted ones."""

from typing import ClassVar

from poise.metrics._rouge import Rouge


class Rouge2(Rouge):
    """Overlap of pairs of words."""

    kind: ClassVar[str] = "rouge2"
    protocol: ClassVar[str] = "rouge-score rouge2, F1, stemmer, mean of answers"
