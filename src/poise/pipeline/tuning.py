"""After all layers are solved: training of what is not a code, end to end, against the original."""

from torch import Tensor

from poise.checkpoints.linears import Skeleton
from poise.checkpoints.rewritten import Rewritten
from poise.core.checkpoint import Checkpoint
from poise.core.format import QTensor
from poise.core.plan import Plan
from poise.core.registry import get
from poise.core.transform import Rewrite
from poise.pipeline.blocks import as_stored, fill
from poise.pipeline.progress import Progress
from poise.pipeline.stream import Calibration
from poise.pipeline.workspace import Workspace
from poise.training.distill import answers, distill_of


def tune(
    checkpoint: Checkpoint, plan: Plan, calibration: Calibration, workspace: Workspace, progress: Progress
) -> Checkpoint:
    """Tunes a solved plan; the workspace then holds the tuned weights.

    Returns:
        the checkpoint with its tuned norms.
    """
    known = workspace.load_tuned()
    if known is None:
        known = _train(checkpoint, plan, calibration, workspace, progress)
    return Rewritten(
        checkpoint, [Rewrite(name=name, kind="set", value=value) for name, value in known.items()]
    )


def _train(
    checkpoint: Checkpoint, plan: Plan, calibration: Calibration, workspace: Workspace, progress: Progress
) -> dict[str, Tensor]:
    skeleton = Skeleton(checkpoint.config)
    linears = {linear.name: linear for linear in checkpoint.linears()}
    rows = {row.name: row for row in plan.quantized}
    recipe = distill_of(str(plan.tune))
    state, hidden = workspace.path / "training", workspace.path / "hidden"
    with get("engine", "torch")(dtype="float32") as engine:
        engine.load(checkpoint)
        trained: dict[str, QTensor] = {}
        names: dict[str, str] = {}
        fixed: list[str] = []
        for name in rows:
            place, linear = skeleton.place(name), linears[name]
            if place.expert is None and linear.experts is None and linear.block is not None:
                trained[place.parameter] = workspace.load(rows[name])
                names[place.parameter] = name
            else:
                fixed.append(name)
        windows = [*calibration.written, *calibration.windows]  # the last ones judge: text of the user's
        original = answers(
            engine.model,
            windows,
            lambda done, every: progress("read the original's answers", done, every),
            hidden=hidden if recipe.hidden > 0 else None,
        )
        for name in fixed:
            fill(engine.model, skeleton, name, as_stored(linears[name], workspace.load(rows[name]).decode()))
        transposed = frozenset(path for path, name in names.items() if linears[name].transposed)
        tuned = recipe.run(
            engine.model,
            original,
            trained,
            transposed,
            windows,
            lambda step, steps, loss, held: progress(f"tune (held-back divergence {held:.4f})", step, steps),
            state,
        )
    for path, weight in tuned.weights.items():
        workspace.store_tuned(rows[names[path]], weight)
    norms = {}
    for name, info in checkpoint.tensors().items():
        value = tuned.norms.get(skeleton.place(name).parameter)
        if value is not None and tuple(value.shape) == tuple(info.shape):
            norms[name] = value.to(checkpoint.read(name).dtype)
    facts = {"before": tuned.before, "after": tuned.after, "steps": tuned.steps}
    workspace.note({"name": "tune", "solver": str(plan.tune), **facts})
    workspace.finish_tuned(norms)
    for file in (state, hidden):
        file.unlink(missing_ok=True)
    return norms
