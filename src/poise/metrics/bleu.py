"""BLEU of generated answers against wanted ones."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.metric import Answer, AnswerMetric


class Bleu(AnswerMetric):
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002), by sacrebleu with its standard settings (Post 2018). Columns are matches
    and totals of one- to four-grams and both lengths: their sums are what the corpus score is made of."""

    unit: ClassVar[str] = "points"
    protocol: ClassVar[str] = "sacrebleu nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp"
    lower_is_better: ClassVar[bool] = False
    against: ClassVar[str] = "wanted"

    @cached_property
    def _bleu(self) -> Any:
        from sacrebleu.metrics.bleu import BLEU

        return BLEU(
            effective_order=True
        )  # counts do not depend on it; without it sacrebleu warns of single sentences

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        found = self._bleu.sentence_score(answer.text, [other.text])
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    def combine(self, sums: Tensor, n: Tensor) -> Tensor:
        from sacrebleu.metrics.bleu import BLEU

        rows = sums.reshape(-1, 10).round().long().tolist()
        scores = [
            BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in rows
        ]
        return torch.tensor(scores, dtype=torch.float64).reshape(sums.shape[:-1])
