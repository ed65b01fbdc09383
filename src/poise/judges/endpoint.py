"""A model behind an endpoint as a judge."""

import math
from typing import Any

from poise.core.errors import EngineError
from poise.core.judge import INSTRUCTION, Judge, preference
from poise.endpoints.client import Client

LIKELIEST = 20


class Endpoint(Judge):
    """Asks for one token with the log-probabilities of the likeliest; without them, for a letter."""

    def __init__(self, client: Client) -> None:
        self.name, self._client = client.name, client

    def prefers_first(self, request: str, first: str, second: str) -> float:
        text = INSTRUCTION.format(request=request, first=first, second=second)
        turn = [{"role": "user", "content": text}]
        answer = self._client.chat(turn, max_tokens=1, logprobs=True, top_logprobs=LIKELIEST)
        try:
            choice = answer["choices"][0]
            listed = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
            if listed:
                return preference(*(_chance(listed, label) for label in "AB"))
            said = str(choice["message"]["content"]).strip().strip(".").upper()
        except (LookupError, TypeError, AttributeError) as error:
            raise EngineError(f"{self.name}: answered no chat completion ({error!r})") from error
        return {"A": 1.0, "B": 0.0}.get(said, math.nan)


def _chance(listed: list[dict[str, Any]], label: str) -> float:
    return sum(math.exp(item["logprob"]) for item in listed if str(item["token"]).strip().upper() == label)
