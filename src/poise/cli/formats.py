"""poise formats: every number format, what it costs and what it loses."""

from typing import Annotated

import typer

from poise.cli import terminal


def run(
    specs: Annotated[
        list[str] | None,
        typer.Argument(help="formats to show, such as nf4 or int(bits=4,group=64); default: all"),
    ] = None,
    error: Annotated[
        bool, typer.Option("--error/--no-error", help="measure errors; takes a while for all")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show bits a weight, groups, signal-to-noise ratio and exporters of number formats.

    The ratio is in dB, on normal weights and on heavy-tailed ones; six more are one bit more.

    Examples:

      poise formats

      poise formats q4_k iq4_xs "int(bits=4, group=64)"
    """
    from poise import pipeline
    from poise.planning.grid import specs as all_specs
    from poise.reports import console, report

    wanted = [spec for given in specs for spec in all_specs(given)] if specs else all_specs()
    with terminal.progress() as progress:
        rows = pipeline.examine(wanted, measure=error, progress=progress)
    if as_json:
        print(report.formats_json(rows))
    else:
        console.print_formats(terminal.out, rows)
