"""Text, cut into windows of tokens."""

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from poise.calibration.hub import is_hub, read_dataset
from poise.calibration.jsonl import read_documents
from poise.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a model reads.

    Attributes:
        name: for reports.
        content: the text itself.
        documents: its parts, where the source has parts.
    """

    name: str
    content: str
    documents: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    def windows(self, tokenizer: Any, length: int, limit: int | None = None) -> list[list[int]]:
        """Consecutive windows of exactly ``length`` tokens, each opened as the tokenizer opens a text.

        What is left at the end is dropped, unless it is all there is.

        Raises:
            UsageError: less than two tokens in the text, or in a window.
        """
        opening = tokenizer("")["input_ids"][:1]
        tokens = tokenizer(self.content, add_special_tokens=False, verbose=False)["input_ids"]
        step = length - len(opening)
        if step < 2:
            raise UsageError(f"windows of {length} tokens are too short to measure anything")
        if len(tokens) < 2:
            raise UsageError(
                f"{self.name}: {len(tokens)} tokens are too few to measure anything; give a longer text"
            )
        starts = range(0, max(1, len(tokens) - step + 1), step)
        return [[*opening, *tokens[start : start + step]] for start in starts][:limit]


def load_text(path: str | Path | None, purpose: str, tokenizer: Any = None) -> Text:
    """A UTF-8 text file, JSON lines (``.jsonl``, see ``jsonl``), a dataset of the hub (see ``hub``), or the short text that comes with Poise.

    Args:
        purpose: ``evaluation`` or ``calibration``: which of the two built-in texts None stands for. They
            share no paragraph, so that a model is not judged on what it was calibrated on.
        tokenizer: of the model, whose chat template conversations get.

    Raises:
        UsageError: the file cannot be read or is empty.
    """
    if path is None:
        content = (resources.files("poise.calibration") / f"{purpose}.txt").read_text(encoding="utf-8")
        return Text(name=f"the built-in {purpose} text", content=content)
    if is_hub(path):
        return _joined(str(path), read_dataset(str(path), tokenizer))
    content = read_utf8(Path(path))
    if Path(path).suffix == ".jsonl":
        return _joined(Path(path).name, read_documents(Path(path), content, tokenizer))
    return Text(name=Path(path).name, content=content)


def read_utf8(path: Path) -> str:
    """What a text file holds.

    Raises:
        UsageError: it cannot be read, is not UTF-8 (names the line), or is empty.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}: not UTF-8 text (line {line}, byte {error.start})") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    if not content.strip():
        raise UsageError(f"{path}: is empty")
    return content


def _joined(name: str, documents: list[str]) -> Text:
    return Text(name=name, content="\n\n".join(documents), documents=tuple(documents))
