"""RougeL of generated answers against wanted ones."""

from typing import ClassVar

from poise.metrics._rouge import Rouge


class RougeL(Rouge):
    """Overlap of the longest common subsequence."""

    kind: ClassVar[str] = "rougeL"
    protocol: ClassVar[str] = "rouge-score rougeL, F1, stemmer, mean of answers"
