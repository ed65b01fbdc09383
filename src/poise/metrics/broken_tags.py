"""How often an answer shows what should be hidden, or leaves it open."""

import re
from typing import ClassVar

from poise.core.metric import Answer, AnswerMetric

MARK = re.compile(r"<\|[^|<>]{1,40}\|>|<(/?)(think|thinking|tool_call|tool_response)>")


class BrokenTags(AnswerMetric):
    """Share of answers with a marker of the chat template in their text, or with tags of thinking or tools that are not
    closed, closed twice or nested."""

    unit: ClassVar[str] = "share"
    protocol: ClassVar[str] = "greedy, markers of a chat template in the text, or tags that do not pair"

    def columns(self, answer: Answer, other: Answer) -> list[float]:
        open_tag = ""
        for mark in MARK.finditer(answer.text):
            closing, tag = mark.group(1), mark.group(2)
            if tag is None or (closing and tag != open_tag) or (not closing and open_tag):
                return [1.0]
            open_tag = "" if closing else tag
        return [float(bool(open_tag))]
