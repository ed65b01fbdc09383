"""Solves a plan block by block: statistics are collected, used and forgotten before the next block is read.

Two streams of hidden states go through the model. The original one comes from the weights as they are. The quantized
one comes from blocks that are solved already, and within a block from the layers that are: what the layer at hand will
really read. Memory holds one block, the statistics of one input group, and hidden states up to a budget; the rest of
them waits on disk.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.format import QTensor
from poise.core.linear import Linear
from poise.core.plan import Plan, PlanRow
from poise.core.registry import build
from poise.core.run import return_freed_memory
from poise.core.solver import Chain, Solver
from poise.core.stats import Stats
from poise.pipeline.attention import attended
from poise.pipeline.blocks import Blocks, Watch
from poise.pipeline.gradients import squared_gradients
from poise.pipeline.moments import Moments, Weighed
from poise.pipeline.passes import Reads, passes_of, room
from poise.pipeline.progress import Progress
from poise.pipeline.solving import solve_matrix
from poise.pipeline.spool import Spool
from poise.pipeline.workspace import Workspace

VALUES = "attention.v"
"""Role of the matrices whose outputs are read as far as they are attended to."""
BATCH_TOKENS = 2048
"""Tokens that a block reads at a time."""
ROUNDED = True
"""Whether products of what a block reads may round their factors to bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the model reads while statistics are collected.

    Attributes:
        windows: token ids, all of one length.
        hash: of the text or the tokens.
        written: further windows that the model wrote itself, which a text lacks for training.
    """

    windows: Sequence[Sequence[int]]
    hash: str
    written: Sequence[Sequence[int]] = ()

    @property
    def tokens(self) -> int:
        """Of the windows, without what was written beside them."""
        return len(self.windows) * len(self.windows[0])

    def first(self, tokens: int) -> "Calibration":
        """No more windows than hold so many tokens, at least one: those of the text, then what was written beside them."""
        count = max(1, tokens // len(self.windows[0]))
        return replace(self, windows=[*self.windows, *self.written][:count], written=())


def solve_plan(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Calibration | None,
    workspace: Workspace,
    progress: Progress,
) -> None:
    """Codes of every planned matrix that has none yet.

    Args:
        calibration: None if no planned solver uses statistics.

    Raises:
        PoiseError: what is finished is kept in the workspace for the next attempt.
    """
    return_freed_memory()
    work = _Work(checkpoint, plan, workspace, progress)
    if calibration is not None and not all(workspace.has(row) for row in plan.quantized):
        _Stream(work, calibration).run()
    work.solve_all(row for row in plan.quantized if row.name not in work.finished)


class _Work:
    """The matrices of a plan, and what is done of them."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, workspace: Workspace, progress: Progress) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        self.workspace = workspace
        self.progress = progress
        self.linears = {linear.name: linear for linear in checkpoint.linears()}
        self.rows = {row.name: row for row in plan.quantized}
        self.total = sum(row.rows * row.columns for row in plan.quantized)
        self.finished: set[str] = set()

    def solve_all(self, rows: Any) -> None:
        for row in rows:
            self.solve(row, None)

    def solve(self, row: PlanRow, stats: Stats | None) -> QTensor | None:
        """Solves and stores one matrix; None if that was done before."""
        found = None
        if not self.workspace.has(row):
            solver, format = build("solver", str(row.solver)), build("format", str(row.format))
            # The weight is not named here, so that it is gone before its codes are packed.
            found, outcome = solve_matrix(
                self.checkpoint.read_matrix(self.linears[row.name]), row, solver, format, stats
            )
            self.workspace.note(asdict(outcome))
            self.workspace.store(row, found)
        self.finished.add(row.name)
        done = sum(self.rows[name].rows * self.rows[name].columns for name in self.finished)
        self.progress(f"quantize {row.name}", done, self.total)
        return found


def runs_of(solver: Solver) -> int:
    """Runs of rows for which a solver, or a step of a chain, wants Hessians of their own."""
    steps = solver.steps if isinstance(solver, Chain) else (solver,)
    return max((int(getattr(step, "runs", 1)) for step in steps), default=1)


class _Stream:
    """The two streams of hidden states, and the statistics on the way."""

    def __init__(self, work: _Work, calibration: Calibration) -> None:
        self.work = work
        self.calibration = calibration
        self.blocks = Blocks(work.checkpoint, rounded=ROUNDED)
        wants = [build("solver", str(row.solver)).wants for row in work.rows.values()]
        self.feeds = any("hessian" in want for want in wants)
        """Whether layers read what quantized layers before them give; else all read the original's."""
        self.crosses = any("cross" in want for want in wants)
        self.room = room(work.checkpoint, work.plan)
        folder = work.workspace.path / "stream"
        self.original = Spool(folder / "original")
        self.quantized = Spool(folder / "quantized")
        self.folder = folder
        self.gradients = self._gradients()

    def _gradients(self) -> dict[str, Tensor]:
        """Of the linears whose solver wants them, by name of the matrix."""
        runs: dict[str, int] = {}
        for row in self.work.rows.values():
            solver = build("solver", str(row.solver))
            if "gradient" in solver.wants and (path := self.blocks.module_path(self.work.linears[row.name])):
                runs[path] = runs_of(solver)
        if not runs:
            return {}
        workspace = self.work.workspace
        known = workspace.load_tensors("gradients")
        if known is None:
            known = squared_gradients(
                self.work.checkpoint, self.calibration.windows, runs, self.work.progress
            )
            workspace.store_tensors("gradients", known)
        return known

    def _weighed(self, linears: list[Linear]) -> Weighed:
        """Weights of tokens in the open block: squared gradients, or for values how much is attended to each token."""
        found: Weighed = {}
        for linear in linears:
            weights = self.gradients.get(self.blocks.module_path(linear) or "")
            if weights is None and linear.role == VALUES and self._is_open([linear], linear.input_group):
                weights = self._attended()
            found.setdefault(linear.input_group, {})[linear.name] = weights
        return found

    def _attended(self) -> Tensor | None:
        """Of the stream that is read before anything of the block is solved, [tokens, 1]."""
        parts = []
        for hidden in self.original if self.crosses else self.quantized:
            part = attended(self.blocks, hidden)
            if part is None:
                return None
            parts.append(part)
        return torch.cat(parts).unsqueeze(1)

    def run(self) -> None:
        length = len(self.calibration.windows[0])
        for hidden in self.blocks.begin(self.calibration.windows, max(1, BATCH_TOKENS // length)):
            self.original.append(hidden)
            if self.feeds:
                self.quantized.append(hidden)
        planned: dict[int, list[Linear]] = {}
        for linear in self.work.linears.values():
            if linear.block is not None and linear.name in self.work.rows:
                planned.setdefault(linear.block, []).append(linear)
        for index in range(len(self.blocks)):
            self.blocks.open(index)
            self._solve_block(planned.get(index, []))
        self.blocks.close()
        self._solve_head()

    def _solve_block(self, linears: list[Linear]) -> None:
        groups = self.blocks.groups(linears)
        open_ = [together for together in groups if any(self._is_open(linears, group) for group in together)]
        names = [group for together in open_ for group in together]
        if not self.feeds:
            moments = Moments(self.blocks)
            self._advance(names, moments.add)
            for linear in linears:
                self.work.solve(self.work.rows[linear.name], moments.stats(linear, self.calibration.hash))
            return
        weighed = self._weighed(linears)
        before = Reads(self.folder / "inputs")
        writers: tuple[str, ...] = ()
        if self.crosses:
            writers = self.blocks.writers(self.original[0][:1], self._of_block())
            self._advance([name for name in names if self.blocks.dense(name)], before.keep, writers)
        passes = passes_of(
            self.blocks,
            self.quantized,
            self._of_block(),
            groups,
            writers,
            self.calibration.tokens,
            self.room,
            self.folder / "last",
        )
        with closing(passes):
            for together in groups:
                moments = Moments(self.blocks, before.inputs, before.streams, weighed)
                passes.read(together, moments.add if together in open_ else None)
                for linear in linears:
                    if linear.input_group in together:
                        row = self.work.rows[linear.name]
                        found = self.work.solve(row, moments.stats(linear, self.calibration.hash))
                        self.blocks.put(linear, (found or self.work.workspace.load(row)).decode())
                before.drop(together)
            passes.leave()

    def _of_block(self) -> list[Linear]:
        """All linears of the open block, planned or not."""
        return [linear for linear in self.work.linears.values() if linear.block == self.blocks.index]

    def _solve_head(self) -> None:
        """A head of its own reads what the final norm gives; a tied one is a table of embeddings too, and has none."""
        heads = [linear for linear in self.work.linears.values() if linear.role == "head"]
        for linear in heads:
            if linear.name in self.work.rows:
                moments = Moments(self.blocks, {} if self.feeds else None)
                for hidden in self.quantized if self.feeds else self.original:
                    moments.add(linear.input_group, self.blocks.finish(hidden).flatten(0, 1))
                self.work.solve(self.work.rows[linear.name], moments.stats(linear, self.calibration.hash))

    def _is_open(self, linears: list[Linear], group: str) -> bool:
        """Whether some matrix that reads this has no codes yet."""
        return any(
            linear.input_group == group and not self.work.workspace.has(self.work.rows[linear.name])
            for linear in linears
        )

    def _advance(self, groups: list[str], see: Watch, writers: Sequence[str] = ()) -> None:
        """The original stream through the open block."""
        for number, hidden in enumerate(self.original):
            after = self.blocks.watch(hidden, groups, see, whole=True, writers=writers)
            assert after is not None  # the whole block ran
            self.original[number] = after
