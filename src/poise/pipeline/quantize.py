"""checkpoint -> linears -> plan -> codes -> artifact -> read back -> manifest."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from poise.calibration.overlap import Hashes, fingerprint
from poise.checkpoints import open_checkpoint
from poise.core.artifact import (
    CARD,
    SHINGLES,
    Artifact,
    Manifest,
    list_files,
    write_atomically,
    write_manifest,
)
from poise.core.checkpoint import Checkpoint
from poise.core.errors import ExportError, PoiseError, UsageError
from poise.core.exporter import Exporter
from poise.core.format import QTensor
from poise.core.linear import Linear
from poise.core.plan import Plan, PlanRow, Recipe
from poise.core.registry import get, name_of, names, parse_spec
from poise.core.run import Run, commit, versions
from poise.core.slabs import WEIGHTS, map_slabs, one_thread_each
from poise.pipeline.estimate import Estimate, artifact_bytes, estimate, free_disk
from poise.pipeline.progress import Progress, silent
from poise.pipeline.reading import reading_of, reads, tokens_of, wants_stats
from poise.pipeline.stream import solve_plan
from poise.pipeline.transforming import checked, corrected, transformed
from poise.pipeline.tuning import tune
from poise.pipeline.workspace import Workspace, explain_full_disk
from poise.planning.planner import check_plan, make_plan
from poise.planning.recipe import load_recipe
from poise.reports.card import model_card


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One export: where it goes and what it holds."""

    out: Path
    exporter: Exporter
    plan: Plan
    gates: dict[str, float]


def quantize(
    model: str | Path,
    recipe: str | Path | Recipe | Plan = "mobile",
    out: str | Path = "quantized",
    *,
    to: str | Sequence[str] = "gguf",
    calibration: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress = silent,
) -> list[Artifact]:
    """Quantizes a model and exports it.

    Args:
        model: folder, ``.gguf`` file or hub id of the original.
        recipe: name of a shipped recipe, a YAML file, a ``plan.json``, or one of these as an object.
        out: folder to make; with several exporters, one folder a name inside it.
        to: exporters.
        calibration: what the original reads, to learn which inputs of each layer matter: a UTF-8 text, JSON lines, or
            ``self``, text that it writes itself. None for ``self`` where much is wanted, for the short text that comes
            with Poise where little will do. Only read if a planned solver uses statistics.
        force: replace what is at ``out`` and any unfinished run.
        resume: continue an unfinished run at the first matrix that is not done.

    Returns:
        One artifact an exporter, each read back and found to be what was meant.

    Raises:
        PoiseError: see its subclasses; what was finished is kept for ``resume``.
    """
    run = Run(command=_command(model, recipe, to, calibration), inputs={})
    checkpoint = open_checkpoint(model)
    wish = _wish(recipe)
    planned = checked(checkpoint, wish.transforms)
    jobs = _jobs(planned, wish, Path(out), to)
    _check_disk(planned, jobs)
    run.inputs["source"] = checkpoint.fingerprint()
    readings = [reading_of(checkpoint, job.plan, calibration) for job in jobs]
    artifacts = []
    for job, reading in zip(jobs, readings, strict=True):
        run.inputs["calibration"] = reading.hash
        key = {
            "source": run.inputs["source"],
            "plan": job.plan.hash,
            "calibration": reading.hash,
            "poise": versions()["poise"],
        }
        job.out.parent.mkdir(parents=True, exist_ok=True)
        if resume and job.out.exists() and (done := _finished(job, key)):
            artifacts.append(done)
            continue
        workspace = Workspace(job.out, key, resume=resume, force=force)
        with explain_full_disk(
            job.out.parent, f"free some and --resume: finished matrices are in {workspace.path}"
        ):
            with workspace.stage("calibrate"):
                windows = reading.calibration(workspace, progress)
            with workspace.stage("solve"):
                first = windows and windows.first(tokens_of(job.plan))
                source = transformed(planned, job.plan, first, workspace, progress)
                solve_plan(source, job.plan, first if wants_stats(job.plan) else None, workspace, progress)
                source = corrected(source, job.plan, first, workspace, progress)
            if job.plan.tune is not None and windows is not None:
                with workspace.stage("train"):
                    source = tune(source, job.plan, windows, workspace, progress)
            if windows is not None:
                tokenizer = checkpoint.tokenizer()
                shingles = fingerprint(tokenizer.decode(window) for window in windows.windows)
            else:
                shingles = None
            artifacts.append(_assemble(source, job, workspace, run, shingles, progress))
    return artifacts


def dry_run(
    model: str | Path,
    recipe: str | Path | Recipe | Plan,
    out: str | Path,
    *,
    to: str | Sequence[str] = "gguf",
    calibration: str | Path | None = None,
) -> list[Estimate]:
    """What ``quantize`` would do: the plan, sizes, time, memory and disk. Reads headers and the calibration text."""
    checkpoint = open_checkpoint(model)
    wish = _wish(recipe)
    planned = checked(checkpoint, wish.transforms)
    jobs = _jobs(planned, wish, Path(out), to)
    return [
        estimate(planned, job.plan, job.out, reading_of(checkpoint, job.plan, calibration)) for job in jobs
    ]


def _command(
    model: str | Path,
    recipe: str | Path | Recipe | Plan,
    to: str | Sequence[str],
    calibration: str | Path | None,
) -> str:
    """The command line of a run, without what does not change its result."""
    wish = (
        recipe
        if isinstance(recipe, str)
        else recipe.name
        if isinstance(recipe, Recipe | Path)
        else "plan.json"
    )
    source = Path(model).name if Path(model).exists() else model
    exporters = [to] if isinstance(to, str) else to
    parts = ["poise quantize", str(source), f"--recipe {wish}", *(f"--to {name}" for name in exporters)]
    return " ".join(parts + ([f"--calibration {Path(calibration).name}"] if calibration else []))


def _jobs(checkpoint: Checkpoint, wish: Recipe | Plan, out: Path, to: str | Sequence[str]) -> list[_Job]:
    exporters = [to] if isinstance(to, str) else list(to)
    if len(set(exporters)) != len(exporters) or not exporters:
        raise UsageError(f"name each exporter once, there is {', '.join(names('exporter'))}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder")
    linears = checkpoint.linears()
    if not linears:
        raise UsageError(f"{checkpoint.source}: has no linear layer to quantize")
    return [
        _job(checkpoint, linears, wish, get("exporter", name)(), out / name if len(exporters) > 1 else out)
        for name in exporters
    ]


def _wish(recipe: str | Path | Recipe | Plan) -> Recipe | Plan:
    if isinstance(recipe, Recipe | Plan):
        return recipe
    if Path(recipe).suffix == ".json":
        try:
            return Plan.from_json(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{recipe}: {error}") from error
    return load_recipe(recipe)


def _job(
    checkpoint: Checkpoint, linears: list[Linear], wish: Recipe | Plan, exporter: Exporter, out: Path
) -> _Job:
    exporter.check(checkpoint)
    if isinstance(wish, Plan):
        if wish.exporter != name_of(exporter):
            raise UsageError(f"the plan is for {wish.exporter}, not for {name_of(exporter)}")
        plan = check_plan(wish, linears, exporter.accepts, exporter.scale_dtype(checkpoint))
        exporter.check_plan(checkpoint, plan)
        return _Job(out=out, exporter=exporter, plan=plan, gates={})
    plan = make_plan(wish, linears, name_of(exporter), exporter.accepts, exporter.scale_dtype(checkpoint))
    exporter.check_plan(checkpoint, plan)
    return _Job(out=out, exporter=exporter, plan=plan, gates=wish.gates)


def _check_disk(checkpoint: Checkpoint, jobs: list[_Job]) -> None:
    for job in jobs:
        need, free = 2 * artifact_bytes(checkpoint, job.plan), free_disk(job.out)
        if need > free:
            raise PoiseError(
                f"{job.out} needs about {need / 1e9:.1f} GB while it is made, {free / 1e9:.1f} GB are free: "
                "free some or choose another disk"
            )


def _finished(job: _Job, key: dict[str, str]) -> Artifact | None:
    """The artifact of an earlier, whole run with the same key, if that is what is there."""
    with suppress(PoiseError):
        artifact = Artifact.open(job.out)
        same = (
            artifact.manifest.plan_hash == key["plan"]
            and artifact.manifest.source_fingerprint == key["source"]
            and artifact.manifest.calibration in (None, key["calibration"])
        )
        if same and not artifact.damaged():
            return artifact
    return None


def _assemble(
    checkpoint: Checkpoint,
    job: _Job,
    workspace: Workspace,
    run: Run,
    shingles: Hashes | None,
    progress: Progress,
) -> Artifact:
    with workspace.stage("export"):
        progress("export", 0, 1)
        folder = workspace.fresh_artifact()
        rows = {row.name: row for row in job.plan.quantized}
        with one_thread_each():  # packing waits for memory, not for arithmetic
            model = job.exporter.export(checkpoint, job.plan, lambda name: workspace.load(rows[name]), folder)
        progress("export", 1, 1)
        exported = open_checkpoint(model)
        _read_back(checkpoint, exported, job, workspace, progress)
    manifest = _manifest(checkpoint, exported, job, run, model.relative_to(folder).as_posix())
    if shingles is not None:
        shingles.astype("<i8").tofile(folder / SHINGLES)
    write_atomically(folder / "plan.json", job.plan.to_json() + "\n")
    write_atomically(folder / CARD, model_card(manifest, job.plan, None))
    manifest = replace(manifest, files=list_files(folder))
    write_manifest(folder, manifest)
    run.matrices, run.stages = workspace.noted(), workspace.seconds()
    workspace.publish()
    run.finish()
    write_atomically(job.out.with_name(job.out.name + ".run.json"), json.dumps(asdict(run), indent=1) + "\n")
    return Artifact(path=job.out, manifest=manifest, plan=job.plan)


def _read_back(
    source: Checkpoint, exported: Checkpoint, job: _Job, workspace: Workspace, progress: Progress
) -> None:
    """Every tensor, decoded by the consumer's own code, must be bit for bit what was meant.

    Raises:
        ExportError: names the first tensor that is not.
    """
    linears = {linear.name: linear for linear in source.linears()}
    rows = {row.name: row for row in job.plan.quantized}
    wanted, present = set(source.tensors()), exported.tensors()
    if wanted != set(present):
        raise ExportError(f"the artifact and the source differ in {sorted(wanted ^ set(present))[:3]}")
    for number, name in enumerate(present, 1):
        if name in rows:
            _compare_codes(exported, linears[name], workspace.load(rows[name]))
        else:
            meant = job.exporter.kept(source, name, source.read(name))
            _compare_kept(name, exported.read(name), meant)
        progress("read back", number, len(present))


def _compare_codes(exported: Checkpoint, linear: Linear, meant: QTensor) -> None:
    """Slab by slab: decoded weights are four times as large as what they were read from."""

    def differs(rows: slice) -> bool:
        got = exported.read_rows(linear, rows)
        return not torch.equal(got, meant[rows].decode().to(got.dtype))

    if any(map_slabs(differs, linear.rows, linear.columns)):
        raise ExportError(
            f"{linear.name}: what {exported.path} decodes to is not what was meant; please report this"
        )


def _compare_kept(name: str, got: Tensor, meant: Tensor) -> None:
    if got.shape != meant.shape:
        raise ExportError(f"{name}: kept, but the exported copy has another shape; please report this")
    for part, wish in zip(*(torch.split(tensor.flatten(), WEIGHTS) for tensor in (got, meant)), strict=True):
        if not torch.equal(part, wish.to(got.dtype)):
            raise ExportError(f"{name}: kept, but the exported copy differs; please report this")
        if not bool(torch.isfinite(part).all()):
            raise ExportError(
                f"{name}: holds values that {got.dtype} cannot represent; plan a wider float format for it"
            )


def _manifest(checkpoint: Checkpoint, exported: Checkpoint, job: _Job, run: Run, model: str) -> Manifest:
    infos = exported.tensors()
    weights = sum(info.numel for info in infos.values())
    planned = [infos[row.name] for row in job.plan.quantized if _is_quantized_linear(row)]
    linear_weights = sum(info.numel for info in planned)
    head, dirty = commit()
    return Manifest(
        source=Path(checkpoint.source).name if Path(checkpoint.source).exists() else checkpoint.source,
        source_fingerprint=run.inputs["source"],
        source_bytes=checkpoint.total_bytes,
        recipe=job.plan.recipe,
        exporter=job.plan.exporter,
        model=model,
        plan_hash=job.plan.hash,
        calibration=run.inputs["calibration"] if reads(job.plan) else None,
        gates=job.gates,
        weights=weights,
        weight_bytes=exported.total_bytes,
        bits_per_weight=8 * exported.total_bytes / weights,
        linear_weights=linear_weights,
        linear_bits_per_weight=8 * sum(info.nbytes for info in planned) / linear_weights if planned else 0.0,
        command=run.command,
        versions=versions(),
        commit=head,
        dirty=dirty,
        files={},
    )


def _is_quantized_linear(row: PlanRow) -> bool:
    """Tables that are looked up are not linears, and floats are not quantized."""
    return row.role != "embedding" and parse_spec(str(row.format))[0] != "float"
