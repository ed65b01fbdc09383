"""What the variants of ROUGE share."""

from functools import cached_property
from typing import Any, ClassVar

from poise.core.metric import Answer, AnswerMetric


class Rouge(AnswerMetric):
    """F1 in points, 0 to 100 (Lin 2004), by rouge-score with its stemmer; mean over answers. Text without letters of the
    Latin alphabet has no words for its tokenizer and gives no number."""

    kind: ClassVar[str]
    unit: ClassVar[str] = "points"
    lower_is_better: ClassVar[bool] = False
    against: ClassVar[str] = "wanted"

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer([self.kind], use_stemmer=True)

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        if not any("a" <= letter <= "z" or letter.isdigit() for letter in other.text.lower()):
            return [float("nan")]
        return [100 * self._scorer.score(other.text, answer.text)[self.kind].fmeasure]
