"""Transforms in their order: some need the architecture alone, some what blocks read, some what rounding did."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from torch import Tensor

from poise.checkpoints.rewritten import Rewritten, as_tensors, from_tensors
from poise.checkpoints.topology import find_topology
from poise.core.checkpoint import Checkpoint
from poise.core.errors import UsageError
from poise.core.linear import Linear
from poise.core.plan import Plan
from poise.core.registry import build
from poise.core.topology import Topology
from poise.core.transform import Material, Read, Rewrite, Transform
from poise.pipeline.blocks import Blocks
from poise.pipeline.moments import Moments
from poise.pipeline.passes import passes_of, room
from poise.pipeline.progress import Progress
from poise.pipeline.spool import Spool
from poise.pipeline.stream import BATCH_TOKENS, Calibration
from poise.pipeline.workspace import Workspace


def checked(checkpoint: Checkpoint, specs: Sequence[str]) -> Checkpoint:
    """The checkpoint as a plan sees it: its tensors have the names and shapes that transforms will leave.

    Raises:
        UsageError: a transform cannot be used on this model, or stands in the wrong place; nothing was read yet.
    """
    transforms = [build("transform", spec) for spec in specs]
    for number, (spec, transform) in enumerate(zip(specs, transforms, strict=True)):
        if transform.unties and number:
            raise UsageError("untie comes before all other transforms")
        if transform.after and any(not other.after for other in transforms[number:]):
            raise UsageError(f"{spec} comes after rounding: put it behind all other transforms")
        _check(checkpoint, spec, transform)
        if transform.unties:
            checkpoint = Rewritten(checkpoint, (), untied=True)
    return checkpoint


def _check(checkpoint: Checkpoint, spec: str, transform: Transform) -> Topology:
    topology = find_topology(checkpoint)
    if (reason := transform.refuses(topology)) is not None:
        raise UsageError(f"{spec} cannot be used on {checkpoint.source}: {reason}")
    return topology


def needs_text(specs: Sequence[str]) -> bool:
    """Whether some transform looks at what blocks read."""
    return any(build("transform", spec).needs for spec in specs)


def transformed(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Calibration | None,
    workspace: Workspace,
    progress: Progress,
) -> Checkpoint:
    """The checkpoint with all that comes before rounding done to it, one transform on top of the other.

    Args:
        checkpoint: as ``checked`` gave it.
        calibration: None if no transform needs text.
    """
    for number, spec in enumerate(plan.transforms):
        transform = build("transform", spec)
        if transform.after or transform.unties:
            continue
        progress(f"transform {spec}", 0, 1)
        known = workspace.load_tensors(f"transform-{number}")
        if known is None:
            topology = _check(checkpoint, spec, transform)
            made = list(_rewrites(checkpoint, plan, transform, topology, calibration, progress))
            known = as_tensors(made)
            workspace.store_tensors(f"transform-{number}", known)
        checkpoint = Rewritten(checkpoint, from_tensors(known))
        progress(f"transform {spec}", 1, 1)
    return checkpoint


def corrected(
    original: Checkpoint,
    plan: Plan,
    calibration: Calibration | None,
    workspace: Workspace,
    progress: Progress,
) -> Checkpoint:
    """The checkpoint with what transforms that come after rounding do to tensors that are not rounded."""
    specs = [spec for spec in plan.transforms if build("transform", spec).after]
    if not specs or calibration is None:
        return original
    known = workspace.load_tensors("corrections")
    if known is None:
        known = as_tensors(_Corrections(original, plan, specs, calibration, workspace).run(progress))
        workspace.store_tensors("corrections", known)
    return Rewritten(original, from_tensors(known))


def _rewrites(
    checkpoint: Checkpoint,
    plan: Plan,
    transform: Transform,
    topology: Topology,
    calibration: Calibration | None,
    progress: Progress,
) -> Sequence[Rewrite]:
    material = Material(topology=topology, read=_reader(checkpoint), formats=_formats(plan), stats={})
    if not transform.needs or calibration is None:
        return transform.rewrites(material)
    if transform.tokens is not None:
        calibration = calibration.first(transform.tokens)
    done: list[Rewrite] = []
    blocks, linears = Blocks(checkpoint), _by_block(checkpoint)
    full = "hessian" in transform.needs
    length = len(calibration.windows[0])
    stream = list(blocks.begin(calibration.windows, max(1, BATCH_TOKENS // length)))
    for index in range(len(blocks)):
        blocks.open(index)
        here = linears.get(index, [])
        moments = Moments(blocks, {} if full else None)
        groups = [group for together in blocks.groups(here) for group in together]
        for number, hidden in enumerate(stream):
            after = blocks.watch(hidden, groups, moments.add, whole=True)
            assert after is not None  # the whole block ran
            stream[number] = after
        stats = {linear.name: moments.stats(linear, calibration.hash) for linear in here}
        seen = {name: value for name, value in stats.items() if value is not None}
        done += transform.rewrites(replace(material, topology=_part(topology, index), stats=seen))
        progress("transform", index + 1, len(blocks))
    blocks.close()
    return done


class _Corrections:
    """Both streams once more, with codes as they are: what each layer reads in the original and in the rounded model."""

    def __init__(
        self,
        original: Checkpoint,
        plan: Plan,
        specs: Sequence[str],
        calibration: Calibration,
        workspace: Workspace,
    ) -> None:
        self.workspace, self.calibration = workspace, calibration
        self.transforms = [build("transform", spec) for spec in specs]
        self.topology = find_topology(original)
        self.rows = {row.name: row for row in plan.quantized}
        self.blocks, self.linears = Blocks(original), _by_block(original)
        self.read, self.room = _reader(original), room(original, plan)

    def run(self, progress: Progress) -> list[Rewrite]:
        length = len(self.calibration.windows[0])
        folder = self.workspace.path / "stream"
        before, after = Spool(folder / "before"), Spool(folder / "after")
        for hidden in self.blocks.begin(self.calibration.windows, max(1, BATCH_TOKENS // length)):
            before.append(hidden)
            after.append(hidden)
        done: list[Rewrite] = []
        for index in range(len(self.blocks)):
            self.blocks.open(index)
            done += self._block(index, before, after)
            progress("correct", index + 1, len(self.blocks))
        self.blocks.close()
        return done

    def _block(self, index: int, before: Spool, after: Spool) -> list[Rewrite]:
        linears = [linear for linear in self.linears.get(index, []) if linear.name in self.rows]
        groups = self.blocks.groups(linears)
        original = Moments(self.blocks)
        for number, hidden in enumerate(before):
            out = self.blocks.watch(
                hidden, [group for part in groups for group in part], original.add, whole=True
            )
            assert out is not None  # the whole block ran
            before[number] = out
        done: list[Rewrite] = []
        passes = passes_of(
            self.blocks,
            after,
            self.linears.get(index, []),
            groups,
            (),
            self.calibration.tokens,
            self.room,
            self.workspace.path / "stream" / "last",
        )
        with closing(passes):
            for together in groups:
                rounded = Moments(self.blocks)
                passes.read(together, rounded.add)
                for linear in linears:
                    if linear.input_group in together:
                        done += self._matrix(linear, original, rounded)
            passes.leave()
        return done

    def _matrix(self, linear: Linear, original: Moments, rounded: Moments) -> list[Rewrite]:
        weight = self.workspace.load(self.rows[linear.name]).decode()
        self.blocks.put(linear, weight)
        stats = [moments.stats(linear, self.calibration.hash) for moments in (original, rounded)]
        if stats[0] is None or stats[1] is None:
            return []
        material = Material(
            topology=self.topology,
            read=self.read,
            formats={},
            stats={linear.name: stats[0]},
            rounded={linear.name: (weight, stats[1])},
        )
        done = [rewrite for transform in self.transforms for rewrite in transform.rewrites(material)]
        for rewrite in done:
            value = self.read(rewrite.name)
            self.blocks.fill(rewrite.name, rewrite.apply(value.reshape(len(value), -1)).view(value.shape))
        return done


def _reader(checkpoint: Checkpoint) -> Read:
    matrices = {linear.name: linear for linear in checkpoint.linears()}

    def read(name: str) -> Tensor:
        if name in matrices:
            return checkpoint.read_matrix(matrices[name]).float()
        return checkpoint.read(name).float()

    return read


def _formats(plan: Plan) -> dict[str, Any]:
    return {row.name: build("format", str(row.format)) for row in plan.quantized}


def _by_block(checkpoint: Checkpoint) -> dict[int, list[Linear]]:
    found: dict[int, list[Linear]] = {}
    for linear in checkpoint.linears():
        if linear.block is not None:
            found.setdefault(linear.block, []).append(linear)
    return found


def _part(topology: Topology, block: int) -> Topology:
    """What belongs to one block."""
    return replace(
        topology,
        norms=tuple(norm for norm in topology.norms if norm.block == block),
        pairs=tuple(pair for pair in topology.pairs if pair.block == block),
    )
