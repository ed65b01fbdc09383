"""Where output goes: data to stdout, progress and messages to stderr, progress only on a terminal."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PIPED_WIDTH = 200
"""Columns of a table that goes to a file or program: nothing in it is cut off."""

out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH)
err = Console(stderr=True)


def quiet_libraries() -> None:
    """Silences the progress bars and advice of the libraries underneath."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the stage and the time that remains."""
    quiet_libraries()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def show(stage: str, done: int, total: int) -> None:
            kind = stage.split()[0]
            if kind not in tasks:
                tasks[kind] = bars.add_task(stage, total=total)
            bars.update(tasks[kind], description=stage, completed=done, total=total)  # type: ignore[arg-type]

        yield show
