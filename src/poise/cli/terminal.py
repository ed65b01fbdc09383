"""Where output goes: data to stdout, progress and messages to stderr: a bar on a terminal, elsewhere now and then a line."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PIPED_WIDTH = 200
"""Columns of a table that goes to a file or program: nothing in it is cut off."""

EVERY = 60.0
"""Seconds between two lines of progress where there is no terminal, such as the log of a run overnight."""

out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH)
err = Console(stderr=True)


def quiet_libraries() -> None:
    """Silences the progress bars and advice of the libraries underneath."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the stage and the time that remains; without a terminal, now and then a line with the stage."""
    quiet_libraries()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}
        told = time.monotonic()

        def show(stage: str, done: int, total: int) -> None:
            nonlocal told
            kind = stage.split()[0]
            if kind not in tasks:
                tasks[kind] = bars.add_task(stage, total=total)
            bars.update(tasks[kind], description=stage, completed=done, total=total)
            if not err.is_terminal and time.monotonic() - told >= EVERY:
                told = time.monotonic()
                err.print(f"{stage}: {done / max(1, total):.0%}", highlight=False, soft_wrap=True)

        yield show
