"""poise quantize: checkpoint + recipe -> artifact."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from poise.cli import terminal

if TYPE_CHECKING:
    from poise.core.plan import Recipe
    from poise.pipeline import Estimate


def run(
    model: Annotated[str, typer.Argument(help="folder, .gguf file, or hub id org/name[@revision]")],
    recipe: Annotated[
        str | None, typer.Option(help="shipped recipe, .yaml file, or plan.json. Default: mobile")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="fast, balanced or best: one width for all linears, instead of a recipe"),
    ] = None,
    bits: Annotated[int, typer.Option(help="of a preset's weights")] = 4,
    group: Annotated[int, typer.Option(help="inputs that share a scale in a preset")] = 64,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to make")] = Path("quantized"),
    to: Annotated[list[str] | None, typer.Option(help="exporter; repeat for several. Default: gguf")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="text or .jsonl file to calibrate on, or self: the model writes it. Default: self where it is needed"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the output and any unfinished run")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue an unfinished run")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say what would be done, and what it needs")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Quantize a model and export it.

    Examples:

      poise quantize HuggingFaceTB/SmolLM2-135M --recipe mobile --to gguf -o smol

      poise quantize ./model --recipe cloud --to compressed-tensors -o served --dry-run

      poise quantize ./model --preset best --bits 3 --to compressed-tensors -o small
    """
    from poise import pipeline
    from poise.reports import console

    wish = _wish(recipe, preset, bits, group)
    exporters = to or ["gguf"]
    if dry_run:
        terminal.quiet_libraries()
        _show_estimates(pipeline.dry_run(model, wish, out, to=exporters, calibration=calibration), as_json)
        return
    with terminal.progress() as progress:
        artifacts = pipeline.quantize(
            model,
            wish,
            out,
            to=exporters,
            calibration=calibration,
            force=force,
            resume=resume,
            progress=progress,
        )
    if as_json:
        found = [
            {"path": str(a.path), "model": str(a.model), "manifest": asdict(a.manifest)} for a in artifacts
        ]
        print(json.dumps({"schema_version": 1, "artifacts": found}, indent=1))
        return
    for artifact in artifacts:
        console.print_plan(terminal.out, artifact.plan)
        console.print_artifact(terminal.out, artifact)


def _wish(recipe: str | None, preset: str | None, bits: int, group: int) -> "str | Recipe":
    from poise.core.errors import UsageError
    from poise.planning.presets import preset_recipe

    if preset is None:
        return recipe or "mobile"
    if recipe is not None:
        raise UsageError("give a recipe or a preset, not both")
    return preset_recipe(preset, bits, group)


def _show_estimates(estimates: list["Estimate"], as_json: bool) -> None:
    from poise.reports import console

    if as_json:
        found = [{**asdict(e), "out": str(e.out)} for e in estimates]
        print(json.dumps({"schema_version": 1, "estimates": found}, indent=1))
        return
    for estimate in estimates:
        console.print_plan(terminal.out, estimate.plan)
        terminal.out.print(
            f"[bold]{escape(str(estimate.out))}[/] would take {estimate.artifact_bytes / 1e6:.1f} MB "
            f"(source {estimate.source_bytes / 1e6:.1f} MB), about {estimate.seconds:.0f} s, "
            f"{estimate.memory / 1e9:.2f} GB of memory and {estimate.disk / 1e6:.1f} MB of disk while it is made "
            f"({estimate.free_disk / 1e9:.1f} GB are free)"
        )
