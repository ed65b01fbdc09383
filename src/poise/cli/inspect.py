"""poise inspect: what is in a checkpoint, a plan or an artifact."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poise.cli import terminal
from poise.core.errors import PoiseError, UsageError

if TYPE_CHECKING:
    from poise.core.artifact import Artifact
    from poise.core.checkpoint import Checkpoint


def run(
    what: Annotated[str, typer.Argument(help="artifact, plan.json, folder, .gguf file or hub id")],
    tensors: Annotated[bool, typer.Option("--tensors", help="one row a tensor")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show types, bits, sizes and roles. An artifact is also checked against its manifest."""
    terminal.quiet_libraries()
    if what.endswith(".json"):
        _show_plan(Path(what), as_json)
    else:
        _show_model(what, tensors, as_json)


def _show_plan(path: Path, as_json: bool) -> None:
    from poise.core.plan import Plan
    from poise.reports.console import print_plan

    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if as_json:
        print(plan.to_json())
    else:
        print_plan(terminal.out, plan)


def _show_model(what: str, tensors: bool, as_json: bool) -> None:
    from poise.checkpoints import open_checkpoint
    from poise.core.artifact import find_artifact
    from poise.reports import console

    artifact = find_artifact(what)
    checkpoint = open_checkpoint(artifact.model if artifact else what)
    if as_json:
        print(json.dumps(_record(checkpoint, artifact), indent=1))
    elif tensors:
        console.print_tensors(terminal.out, checkpoint)
    else:
        console.print_checkpoint(terminal.out, checkpoint)
    if artifact and not as_json:
        console.print_plan(terminal.out, artifact.plan)
        console.print_artifact(terminal.out, artifact)
    if artifact and (damaged := artifact.damaged()):
        raise PoiseError(
            f"{what}: {', '.join(damaged)} differ from the manifest: changed or damaged since they were made"
        )


def _record(checkpoint: "Checkpoint", artifact: "Artifact | None") -> dict[str, object]:
    linears = {linear.name: asdict(linear) for linear in checkpoint.linears()}
    return {
        "schema_version": 1,
        "source": checkpoint.source,
        "kind": checkpoint.kind,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "bytes": checkpoint.total_bytes,
        "fingerprint": checkpoint.fingerprint(),
        "tensors": {
            name: {**asdict(info), "linear": linears.get(name)} for name, info in checkpoint.tensors().items()
        },
        "manifest": asdict(artifact.manifest) if artifact else None,
    }
