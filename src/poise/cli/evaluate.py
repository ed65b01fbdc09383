"""poise evaluate: what a quantized model lost and saved."""

from pathlib import Path
from typing import Annotated

import typer

from poise.cli import terminal

GATE_MISSED = 3


def run(
    candidate: Annotated[str, typer.Argument(help="artifact, folder, .gguf file or hub id")],
    reference: Annotated[str, typer.Option(help="the original to compare with")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to read; default: a short sample")] = None,
    window: Annotated[int, typer.Option(min=8, help="tokens of a window")] = 256,
    windows: Annotated[int | None, typer.Option(min=1, help="read at most so many windows")] = None,
    engine: Annotated[
        str | None, typer.Option(help="engine of the candidate, e.g. llamacpp(threads=2)")
    ] = None,
    reference_engine: Annotated[str | None, typer.Option(help="engine of the original")] = None,
    efficiency: Annotated[bool, typer.Option(help="measure memory and latency too")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder for report.json, report.md, quality.svg")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print report.json")] = False,
) -> None:
    """Compare a quantized model with its original. Exit code 3: a quality gate is missed.

    Example:

      poise evaluate smol --reference HuggingFaceTB/SmolLM2-135M --text my-domain.txt -o report
    """
    from poise import pipeline
    from poise.reports import console, report

    with terminal.progress() as progress:
        comparison = pipeline.evaluate(
            candidate,
            reference,
            text=text,
            window=window,
            windows=windows,
            engine=engine,
            reference_engine=reference_engine,
            efficiency=efficiency,
            out=out,
            progress=progress,
        )
    if as_json:
        print(report.to_json(comparison))
    else:
        console.print_comparison(terminal.out, comparison)
    if not comparison.passed:
        raise typer.Exit(GATE_MISSED)
