"""Rouge1 of generated answers against wanted ones."""

from typing import ClassVar

from poise.metrics._rouge import Rouge


class Rouge1(Rouge):
    """Overlap of single words."""

    kind: ClassVar[str] = "rouge1"
    protocol: ClassVar[str] = "rouge-score rouge1, F1, stemmer, mean of answers"
