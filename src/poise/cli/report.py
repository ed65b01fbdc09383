"""poise report: renders a comparison again."""

from pathlib import Path
from typing import Annotated

import typer

from poise.cli import terminal


def run(
    verdict: Annotated[Path, typer.Argument(help="verdict.json of poise compare")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="folder for report.html and report.md; default: beside it"),
    ] = None,
) -> None:
    """Write the reports of a comparison again from its verdict.json.

    Example:

      poise report comparison/verdict.json -o elsewhere
    """
    from poise.reports.verdict import read_verdict, write_verdict

    folder = out or verdict.parent
    write_verdict(read_verdict(verdict), folder)
    terminal.out.print(f"{folder / 'report.html'}", highlight=False)
