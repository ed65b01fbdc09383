"""poise bench: size, memory and speed of models side by side."""

from typing import Annotated

import typer

from poise.cli import terminal


def run(
    models: Annotated[
        list[str], typer.Argument(help="artifacts, folders, .gguf files or hub ids; ratios to the first")
    ],
    engine: Annotated[
        list[str] | None, typer.Option(help="one engine a model, in order; default: by kind")
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0, help="price of an hour of this machine: prints the cost of a million tokens"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure size, memory and speed. The models take turns, so that a noisy machine is fair to all.

    Example:

      poise bench original f16.gguf mobile
    """
    from poise import pipeline
    from poise.reports import console, report

    with terminal.progress() as progress:
        sides = pipeline.bench(models, engine or (), progress, price)
    if as_json:
        print(report.sides_json(sides))
    else:
        console.print_sides(terminal.out, sides)
