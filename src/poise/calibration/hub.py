"""Documents of a dataset of the Hugging Face hub, read row by row."""

import re
from collections.abc import Iterator
from typing import Any

from poise.calibration.jsonl import document
from poise.core.errors import MissingExtra, UsageError

SCHEME = "hf://"
ROWS = 2000
"""Rows that are read at most: several times what any solver wants."""


def is_hub(source: object) -> bool:
    """Whether a source names a dataset of the hub."""
    return str(source).startswith(SCHEME)


def read_dataset(source: str, tokenizer: Any) -> list[str]:
    """The first rows of ``hf://org/name``, ``hf://org/name:config`` or ``hf://org/name:config/split``.

    Rows have the shapes of JSON lines. The split is ``train`` unless it is named.

    Raises:
        MissingExtra: ``datasets`` is not installed.
        UsageError: no such dataset, or rows of unknown shape.
    """
    parts = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:/([\w.-]+))?", source)
    if parts is None:
        raise UsageError(
            f"{source}: a dataset is written hf://org/name, hf://org/name:config or hf://org/name:config/split"
        )
    name, config, split = parts.groups()
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "datasets") from error
    try:
        rows: Iterator[Any] = iter(
            datasets.load_dataset(name, config, split=split or "train", streaming=True)
        )
        return [
            row if isinstance(row, str) else document(row, f"{source}, row {number}", tokenizer)
            for number, row in zip(range(1, ROWS + 1), rows, strict=False)
        ]
    except UsageError:
        raise
    except Exception as error:  # the library raises whatever its back ends do
        raise UsageError(f"{source}: cannot be read ({str(error).splitlines()[0][:200]})") from error
