"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while work goes on."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
