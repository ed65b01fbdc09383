"""poise report: renders a comparison again."""

from pathlib import Path
from typing import Annotated

import typer

from poise.cli import terminal


def run(
    verdict: Annotated[Path, typer.Argument(help="folder of poise compare, or its verdict.json")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="folder for report.html and report.md; default: beside it"),
    ] = None,
) -> None:
    """Write the reports of a comparison again from its verdict.json.

    Example:

      poise report comparison -o elsewhere
    """
    from poise.reports.verdict import read_verdict, write_verdict

    file = verdict / "verdict.json" if verdict.is_dir() else verdict
    folder = out or file.parent
    write_verdict(read_verdict(file), folder)
    terminal.out.print(f"{folder / 'report.html'}", highlight=False)
