"""chrF of generated answers against wanted ones."""

from functools import cached_property
from typing import Any, ClassVar

from poise.core.metric import Answer, AnswerMetric


class Chrf(AnswerMetric):
    """Character n-gram F-score, 0 to 100 (Popović 2015), by sacrebleu; mean over answers."""

    unit: ClassVar[str] = "points"
    protocol: ClassVar[str] = (
        "sacrebleu chrF2, nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no, mean of answers"
    )
    lower_is_better: ClassVar[bool] = False
    against: ClassVar[str] = "wanted"

    @cached_property
    def _chrf(self) -> Any:
        from sacrebleu.metrics.chrf import CHRF

        return CHRF()

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        return [self._chrf.sentence_score(answer.text, [other.text]).score]
