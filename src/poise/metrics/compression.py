"""How much an answer repeats itself, by what a compressor saves."""

import zlib
from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric

LENGTH = 400


class Compression(AnswerMetric):
    """Bytes over compressed bytes of the first 400 characters: the compression ratio of Shaib et al. 2024, who found it the most
    telling single figure of repetition. Cut to one length, because longer text compresses better."""

    unit: ClassVar[str] = "ratio"
    protocol: ClassVar[str] = f"zlib level 9, first {LENGTH} characters, mean of answers"
    ratio: ClassVar[bool] = True
    shifts: ClassVar[bool] = True

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        data = answer.text[:LENGTH].encode()
        return [len(data) / len(zlib.compress(data, 9)) if data else float("nan")]
