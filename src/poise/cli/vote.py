"""poise vote: people choose between answers without knowing who wrote them."""

from pathlib import Path
from typing import Annotated

import typer

from poise.cli import terminal


def run(
    comparison: Annotated[Path, typer.Argument(help="folder that poise compare --prompts wrote")],
    host: Annotated[
        str, typer.Option(help="address to listen on; this machine only by default")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8321,
    seed: Annotated[int, typer.Option(help="of sides and order")] = 0,
    results: Annotated[
        bool, typer.Option("--results", help="print what was voted so far and serve nothing")
    ] = False,
) -> None:
    """Serve a blind page with two answers side by side; votes are kept in the folder.

    Example:

      poise vote comparison
    """
    from poise.pipeline.vote import serve_vote, tally
    from poise.reports import console

    if results:
        console.print_strengths(terminal.out, tally(comparison))
        return
    terminal.err.print(f"Vote on http://{host}:{port}/ and end with Ctrl-C", highlight=False)
    serve_vote(comparison, host, port, seed)
    console.print_strengths(terminal.out, tally(comparison))
