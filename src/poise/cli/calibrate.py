"""poise calibrate: choosing what models read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from poise.cli import terminal

app = typer.Typer(help="Choose calibration text.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def calibrate() -> None:
    """Choose calibration text."""


@app.command("select")
def select(
    model: Annotated[str, typer.Argument(help="folder, .gguf file, or hub id of the model that will read")],
    source: Annotated[Path, typer.Option("--from", help="text or .jsonl file to choose from")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help=".jsonl file to write")] = None,
    windows: Annotated[int, typer.Option(help="windows that are wanted")] = 32,
    length: Annotated[int, typer.Option(help="tokens of a window")] = 512,
    method: Annotated[str, typer.Option(help="coverage, cluster or random")] = "coverage",
    domain: Annotated[
        Path | None,
        typer.Option(help="text like that which the model will be asked: what is near to it is chosen"),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(help="code such as en: only windows in it compete; repeat for several"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of cluster and random")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Choose windows of a text that cover what the model tells apart, without doubles.

    Distances are those of mean hidden states in the middle of the stack; 1.4 is that of two typical texts.

    Examples:

      poise calibrate select ./model --from corpus.jsonl --windows 64 -o chosen.jsonl

      poise calibrate select ./model --from corpus.txt --domain tickets.txt --language en -o chosen.jsonl
    """
    from poise import pipeline
    from poise.reports import console

    with terminal.progress() as progress:
        found = pipeline.choose(
            model,
            source,
            out,
            windows=windows,
            length=length,
            method=method,
            domain=domain,
            language=language or [],
            seed=seed,
            progress=progress,
        )
    if as_json:
        print(json.dumps({"schema_version": 1, **asdict(found)}, indent=1))
        return
    console.print_choices(
        terminal.out,
        [
            (choice.index, choice.reason, text)
            for choice, text in zip(found.choices, found.texts, strict=True)
        ],
    )
    foreign = "".join(f", {number} in {code}" for code, number in found.foreign.items())
    terminal.out.print(
        f"{len(found.texts)} of {found.candidates} windows; left out: {found.doubles} doubles{foreign}. Distance to the nearest "
        f"chosen: mean {found.chosen.mean:.3f}, 95 % {found.chosen.p95:.3f}, largest {found.chosen.largest:.3f}; at "
        f"random: {found.random.mean:.3f}, {found.random.p95:.3f}, {found.random.largest:.3f}"
    )
