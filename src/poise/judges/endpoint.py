"""Any endpoint that speaks the chat completions of OpenAI as a judge: llama.cpp, vLLM, Ollama, hosted models."""

import math
import time
from typing import Any

from poise.core.errors import EngineError
from poise.core.judge import INSTRUCTION, Judge, preference

TRIES = 4
TIMEOUT = 120.0
LIKELIEST = 20
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)


class Endpoint(Judge):
    """Asks for one token with the log-probabilities of the likeliest; without them, for a letter.

    Args:
        url: base address, such as ``http://127.0.0.1:8000/v1``.
        model: name that the endpoint knows.
        key: sent as a bearer token, if there is one; it is never written anywhere.
        wait: seconds before the second try; doubled each time.
    """

    def __init__(self, url: str, model: str, key: str | None = None, wait: float = 1.0) -> None:
        import httpx2

        self.name = f"{model} at {url}"
        self._url, self._model, self._wait = url.rstrip("/"), model, wait
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(timeout=TIMEOUT, headers=headers)

    def prefers_first(self, request: str, first: str, second: str) -> float:
        text = INSTRUCTION.format(request=request, first=first, second=second)
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": LIKELIEST,
        }
        answer = self._ask(body)
        try:
            choice = answer["choices"][0]
            listed = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
            if listed:
                return preference(*(_chance(listed, label) for label in "AB"))
            said = str(choice["message"]["content"]).strip().strip(".").upper()
        except (LookupError, TypeError, AttributeError) as error:
            raise EngineError(f"{self.name}: answered no chat completion ({error!r})") from error
        return {"A": 1.0, "B": 0.0}.get(said, math.nan)

    def _ask(self, body: dict[str, Any]) -> Any:
        import httpx2

        problem = ""
        for number in range(TRIES):
            if number:
                time.sleep(self._wait * 2 ** (number - 1))
            try:
                reply = self._client.post(f"{self._url}/chat/completions", json=body)
            except httpx2.HTTPError as error:
                problem = str(error) or type(error).__name__
                continue
            if reply.status_code in AGAIN:
                problem = f"status {reply.status_code}"
                continue
            if reply.status_code != 200:
                raise EngineError(f"{self.name}: status {reply.status_code}: {reply.text[:200]}")
            try:
                return reply.json()
            except ValueError as error:
                raise EngineError(f"{self.name}: answered no JSON") from error
        raise EngineError(
            f"{self.name}: {problem} after {TRIES} tries; what is judged is kept, run again to go on"
        )


def _chance(listed: list[dict[str, Any]], label: str) -> float:
    return sum(math.exp(item["logprob"]) for item in listed if str(item["token"]).strip().upper() == label)
