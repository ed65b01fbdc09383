"""Documents in JSON lines: plain texts, prompts with answers, or conversations in the chat template of the model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from poise.core.errors import UsageError

TEXTS = ("text", "content", "document", "raw_content")
"""Keys of a plain text."""
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
"""Keys of a question and its answer, which become a conversation of two turns."""
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""``from`` of ShareGPT -> role of a chat template."""


def read_documents(path: Path, content: str, tokenizer: Any) -> list[str]:
    """One document a line: a string, or an object with one of the known shapes.

    Raises:
        UsageError: a line is not JSON or has no known shape, or the tokenizer has no chat template; names file and line.
    """
    return [
        item if isinstance(item, str) else document(item, where, tokenizer)
        for where, item in read_lines(path, content)
    ]


def read_lines(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    """What each line holds, with its file and line for errors; blank ones are passed over.

    Raises:
        UsageError: a line is not JSON.
    """
    for number, line in enumerate(content.splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                yield where, json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where}: not JSON ({error})") from error


def document(item: Any, where: str, tokenizer: Any) -> str:
    """The text of one object.

    Args:
        where: file and line, for errors.

    Raises:
        UsageError: see ``read_documents``.
    """
    if not isinstance(item, dict):
        raise UsageError(f"{where}: a {type(item).__name__}; each line is a string or an object")
    for key in TEXTS:
        if isinstance(item.get(key), str):
            found: str = item[key]
            return found
    if (turns := _turns(item, where)) is not None:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                f"{where}: a conversation, but the tokenizer has no chat template; give plain text as {TEXTS[0]!r}"
            )
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # templates raise whatever their authors wrote
            raise UsageError(f"{where}: the chat template refuses it ({error})") from error
    known = [*TEXTS, "messages", "conversations", *(" and ".join(pair) for pair in PAIRS)]
    raise UsageError(f"{where}: keys {', '.join(sorted(item)) or 'none'}; known are {', '.join(known)}")


def _turns(item: dict[str, Any], where: str) -> list[dict[str, str]] | None:
    """A conversation as chat templates take it, or None."""
    if isinstance(item.get("messages"), list):
        turns = [
            {"role": turn.get("role"), "content": turn.get("content")}
            for turn in _objects(item["messages"], where)
        ]
    elif isinstance(item.get("conversations"), list):
        turns = [
            {"role": ROLES.get(str(turn.get("from"))), "content": turn.get("value")}
            for turn in _objects(item["conversations"], where)
        ]
    else:
        pair = next((pair for pair in PAIRS if all(isinstance(item.get(key), str) for key in pair)), None)
        if pair is None:
            return None
        turns = [{"role": "user", "content": item[pair[0]]}, {"role": "assistant", "content": item[pair[1]]}]
    for number, turn in enumerate(turns, 1):
        if not all(isinstance(value, str) for value in turn.values()):
            raise UsageError(f"{where}: turn {number} lacks a role or a text")
    return turns  # type: ignore[return-value]  # every value is a string


def _objects(turns: list[Any], where: str) -> list[dict[str, Any]]:
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UsageError(f"{where}: a conversation is a list of objects, one a turn")
    return turns
