"""Scores that are there already: one file of JSON lines for a pair of models and a protocol, one line a sample."""

import hashlib
import json
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


class Cache:
    """Records by the key of their sample. What was written before an interruption is there afterwards.

    Args:
        folder: None keeps nothing.
        facts: all that a record depends on but the sample: models, engines, protocol.
    """

    def __init__(self, folder: Path | None, facts: dict[str, Any]) -> None:
        text = json.dumps({"schema_version": SCHEMA_VERSION, **facts}, sort_keys=True)
        self._path = folder and folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self._known: dict[str, Any] = {}
        if self._path and self._path.exists():
            text = self._path.read_text(encoding="utf-8")
            for line in text.splitlines():
                try:
                    key, record = json.loads(line)
                except ValueError:
                    continue  # the line that was being written when a run ended
                self._known[key] = record
            if not text.endswith("\n"):
                self._append("")
        elif self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def __setitem__(self, key: str, record: Any) -> None:
        self._known[key] = record
        self._append(json.dumps([key, record]))

    def _append(self, line: str) -> None:
        if self._path:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
