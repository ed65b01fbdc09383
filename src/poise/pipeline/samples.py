"""What models are judged on: windows of text, questions with choices, prompts with wanted answers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poise.calibration.jsonl import document, read_lines
from poise.calibration.text import Text, load_text, read_utf8
from poise.core.errors import UsageError

PROMPTS = ("prompt", "question", "instruction", "input")
WANTED = ("reference", "answer", "completion", "response", "output", "target")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How text is cut, and which positions count.

    Attributes:
        length: tokens of a window.
        first: positions of a window that only give context.
        opens: every window begins as the tokenizer opens a text; else only the text does.
        replaces: the opening takes the place of the window's first token.
    """

    name: str
    length: int
    first: int = 0
    opens: bool = True
    replaces: bool = False


PROTOCOLS = {
    "windows": Protocol(name="windows", length=512),
    "gptq-2048": Protocol(name="gptq-2048", length=2048, opens=False),
    "llamacpp": Protocol(name="llamacpp", length=512, first=256, replaces=True),
}
"""``gptq-2048``: Frantar et al. 2022, windows of one long text, every position. ``llamacpp``: ``llama-perplexity`` with 512 tokens
of context, where the second half of a window counts."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens that are read at once.

    Attributes:
        document: what it is cut from; windows of one document are not independent.
        domain: the file that the document comes from.
        first: the first position whose prediction counts.
        text: what the predicted tokens stand for.
    """

    document: str
    domain: str
    tokens: tuple[int, ...]
    first: int
    text: str

    @property
    def key(self) -> str:
        return _key((self.tokens, self.first))


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question to answer; with choices the likeliest is the answer, without them the model writes one.

    Attributes:
        text: what the model reads, in its chat template.
        turns: the conversation behind it, as role and content; none where a model has no template.
        asked: the question alone, as reports show it.
        wanted: the reference answer, if there is one.
        right: number of the right choice.
    """

    document: str
    domain: str
    text: str
    asked: str
    wanted: str | None
    turns: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()
    right: int = 0

    @property
    def key(self) -> str:
        return _key(
            {name: value for name, value in asdict(self).items() if name != "turns"}
        )  # the text has them


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def read_windows(
    texts: Sequence[Text], tokenizer: Any, protocol: Protocol, limit: int | None
) -> list[Window]:
    """All windows of all texts, at most ``limit`` of each.

    A file of JSON lines has a document a line, and no window crosses its end. Plain text has no documents that can be
    told: each window counts as one.
    """
    found: list[Window] = []
    for text in texts:
        cut = [
            (name, tokens)
            for name, content in _documents(text)
            for tokens in _cut(Text(name=text.name, content=content), tokenizer, protocol)
        ]
        for number, (name, tokens) in enumerate(cut[:limit]):
            scored = tokens[protocol.first + 1 :]
            found.append(
                Window(
                    document=name or f"{text.name}, window {number + 1}",
                    domain=text.name,
                    tokens=tuple(tokens),
                    first=protocol.first,
                    text=tokenizer.decode(scored),
                )
            )
    return found


def _documents(text: Text) -> list[tuple[str, str]]:
    parts = text.documents
    return (
        [(f"{text.name}, document {n}", part) for n, part in enumerate(parts, 1)]
        if parts
        else [("", text.content)]
    )


def _cut(text: Text, tokenizer: Any, protocol: Protocol) -> list[list[int]]:
    if protocol.opens and not protocol.replaces:
        return text.windows(tokenizer, protocol.length)
    opening = tokenizer("")["input_ids"][:1]
    tokens = [*opening, *tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]]
    windows = [tokens[at : at + protocol.length] for at in range(0, len(tokens), protocol.length)]
    whole = [window for window in windows if len(window) == protocol.length]
    if not whole:
        raise UsageError(
            f"{text.name}: {len(tokens)} tokens are fewer than the {protocol.length} of {protocol.name}"
        )
    if protocol.replaces and opening:
        whole = [[*opening, *window[1:]] for window in whole]
    return whole


def read_prompts(path: Path, tokenizer: Any) -> list[Prompt]:
    """Questions of a file of JSON lines.

    A line has ``question`` (or ``prompt``) and may have ``answer`` (or ``reference``); ``messages`` whose last turn is the
    assistant's; or ``question``, ``choices`` (a list of texts) and ``answer``: the number of the right one from 0, its letter, or its
    text. ``document`` and ``domain`` name what it belongs to.

    Raises:
        UsageError: the file cannot be read, or a line has another shape; names file and line.
    """
    found = []
    for number, (where, item) in enumerate(read_lines(path, read_utf8(path)), 1):
        if not isinstance(item, dict):
            raise UsageError(f"{where}: a {type(item).__name__}; each line is an object")
        found.append(_prompt(item, where, number, path.name, tokenizer))
    return found


def _prompt(item: dict[str, Any], where: str, number: int, file: str, tokenizer: Any) -> Prompt:
    named = str(item.get("document", f"{file}, line {number}"))
    domain = str(item.get("domain", file))
    if isinstance(item.get("messages"), list):
        told = item["messages"]
        answered = bool(told) and isinstance(told[-1], dict) and told[-1].get("role") == "assistant"
        asked = told[:-1] if answered else told
        document({"messages": asked}, where, tokenizer)  # says what is wrong with them
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        wanted = str(told[-1]["content"]) if answered else None
        return Prompt(
            document=named,
            domain=domain,
            text=text,
            asked=str(asked[-1]["content"]),
            wanted=wanted,
            turns=tuple((str(turn["role"]), str(turn["content"])) for turn in asked),
        )
    text = next((item[key] for key in PROMPTS if isinstance(item.get(key), str)), None)
    if text is None:
        raise UsageError(
            f"{where}: keys {', '.join(sorted(item)) or 'none'}; a line needs {', '.join(PROMPTS)} or messages"
        )
    question = text
    answer = next((item[key] for key in WANTED if item.get(key) is not None), None)
    if "choices" in item:
        choices = item["choices"]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
            raise UsageError(f"{where}: choices are two texts at least")
        right = _right(answer, choices, where)
        return Prompt(
            document=named,
            domain=domain,
            text=text,
            asked=text,
            wanted=choices[right],
            choices=tuple(choices),
            right=right,
        )
    turns: tuple[tuple[str, str], ...] = ()
    if getattr(tokenizer, "chat_template", None):
        turns = (("user", text),)
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    wanted = None if answer is None else str(answer)
    return Prompt(document=named, domain=domain, text=text, asked=question, wanted=wanted, turns=turns)


def _right(answer: Any, choices: list[str], where: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and 0 <= ord(answer.upper()) - ord("A") < len(choices):
        return ord(answer.upper()) - ord("A")
    raise UsageError(f"{where}: answer {answer!r} is none of the {len(choices)} choices")


def load_texts(paths: Sequence[str | Path], tokenizer: Any) -> list[Text]:
    """The given texts, or the short one that comes with Poise."""
    if not paths:
        return [load_text(None, "evaluation")]
    return [load_text(path, "evaluation", tokenizer) for path in paths]
