"""A client of what OpenAI's chat completions have become the standard of: llama.cpp, vLLM, Ollama, hosted models."""

import json
import time
from collections.abc import Iterator
from typing import Any

from poise.core.errors import EngineError

TRIES = 4
TIMEOUT = 120.0
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)


def is_address(source: object) -> bool:
    """Whether this names an endpoint rather than a file."""
    return str(source).startswith(("http://", "https://"))


class Client:
    """Asks again when an endpoint is busy or gone for a moment.

    Args:
        url: base address, such as ``http://127.0.0.1:8000/v1``; ``#NAME`` behind it names the model.
        model: name that the endpoint knows; by default the only one that it lists.
        key: sent as a bearer token, if there is one; it is never written anywhere.
        wait: seconds before the second try; doubled each time.

    Raises:
        EngineError: nobody is there, or there are several models and none is named.
    """

    def __init__(self, url: str, model: str = "", key: str | None = None, wait: float = 1.0) -> None:
        import httpx2

        address, _, named = url.partition("#")
        self.url, self._wait = address.rstrip("/"), wait
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(timeout=TIMEOUT, headers=headers)
        self.name = self.url
        self.model = model or named or self._only()
        self.name = f"{self.model} at {self.url}"

    def chat(self, messages: list[dict[str, str]], **options: Any) -> Any:
        """The reply to a conversation, greedily written."""
        return self._ask("chat/completions", {"messages": messages, **options})

    def complete(self, prompt: str, **options: Any) -> Any:
        """The reply to a bare text."""
        return self._ask("completions", {"prompt": prompt, **options})

    def stream(self, messages: list[dict[str, str]], limit: int) -> Iterator[dict[str, Any]]:
        """Pieces of a reply as they come, as the endpoint writes them. Not tried again: times would be wrong."""
        import httpx2

        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": limit,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as reply:
                if reply.status_code != 200:
                    raise EngineError(f"{self.name}: status {reply.status_code}")
                for line in reply.iter_lines():
                    content = line.removeprefix("data:").strip()
                    if line.startswith("data:") and content != "[DONE]":
                        yield json.loads(content)
        except (httpx2.HTTPError, ValueError) as error:
            raise EngineError(f"{self.name}: the stream broke off ({error})") from error

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        return self._request("POST", path, json={"model": self.model, "temperature": 0, **body})

    def _request(self, method: str, path: str, **content: Any) -> Any:
        import httpx2

        problem = ""
        for number in range(TRIES):
            if number:
                time.sleep(self._wait * 2 ** (number - 1))
            try:
                reply = self._client.request(method, f"{self.url}/{path}", **content)
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
            f"{self.name}: {problem} after {TRIES} tries; what is done is kept, run again to go on"
        )

    def _only(self) -> str:
        listed = self._request("GET", "models")
        try:
            models = [str(item["id"]) for item in listed["data"]]
        except (LookupError, TypeError) as error:
            raise EngineError(f"{self.url}: lists no models; name one: {self.url}#NAME") from error
        if len(models) != 1:
            raise EngineError(
                f"{self.url}: serves {', '.join(models) or 'nothing'}; name one: {self.url}#NAME"
            )
        return models[0]
