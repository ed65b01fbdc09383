"""poise probe: the memory of one model in a fresh process, for the memory metric."""

import json
from typing import Annotated

import typer

from poise.cli import terminal


def run(model: str, engine: Annotated[str, typer.Option()]) -> None:
    """Print the resident bytes before loading a model and at the peak of running it."""
    from poise import pipeline

    terminal.quiet_libraries()
    print(json.dumps(pipeline.probe(model, engine)))
