"""Solves a plan block by block: statistics are collected, used and forgotten before the next block is read.

Two streams of hidden states go through the model. The original one comes from the weights as they are. The quantized
one comes from blocks that are solved already, and within a block from the layers that are: what the layer at hand will
really read. Memory holds one block, the statistics of one input group, and hidden states up to a budget; the rest of
them waits on disk.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.errors import FormatError, PoiseError, PoiseWarning
from poise.core.format import Format, QTensor
from poise.core.linear import Linear
from poise.core.plan import Plan, PlanRow
from poise.core.registry import build
from poise.core.slabs import map_slabs
from poise.core.solver import Solver
from poise.core.stats import Stats
from poise.pipeline.blocks import Blocks
from poise.pipeline.spool import Spool
from poise.pipeline.workspace import Workspace

BATCH_TOKENS = 2048
"""Tokens that a block reads at a time."""
READ = 1 << 26
"""Bytes of what one input group read in the original that stay in memory."""
FEW = 4
"""Tokens an input, below which a Hessian is called poorly known, and an expert starved."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while work goes on."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What solving one matrix came to.

    Attributes:
        weight_error: |W - W'|^2 / |W|^2.
        output_error: E|(W - W') x|^2 / E|W x|^2 under the statistics there were; NaN without any.
        nearest: the same for rounding to nearest.
        tokens: behind the statistics, 0 without any.
        warnings: what was mended or is doubtful.
    """

    name: str
    format: str
    solver: str
    seconds: float
    weight_error: float
    output_error: float
    nearest: float
    tokens: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the model reads while statistics are collected.

    Attributes:
        windows: token ids, all of one length.
        hash: of the text or the tokens.
    """

    windows: Sequence[Sequence[int]]
    hash: str

    def first(self, tokens: int) -> "Calibration":
        """No more windows than hold so many tokens, at least one."""
        return replace(self, windows=self.windows[: max(1, tokens // len(self.windows[0]))])


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
    work = _Work(checkpoint, plan, workspace, progress)
    if calibration is None:
        work.solve_all(plan.quantized)
        return
    stream = _Stream(work, calibration)
    stream.run()
    work.solve_all(row for row in plan.quantized if row.name not in work.finished)


class _Work:
    """The matrices of a plan, and what is done of them."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, workspace: Workspace, progress: Progress) -> None:
        self.checkpoint = checkpoint
        self.workspace = workspace
        self.progress = progress
        self.linears = {linear.name: linear for linear in checkpoint.linears()}
        self.rows = {row.name: row for row in plan.quantized}
        self.total = sum(row.rows * row.columns for row in plan.quantized)
        self.finished: set[str] = set()

    def solve_all(self, rows: Any) -> None:
        for row in rows:
            self.solve(row, None)

    def solve(self, row: PlanRow, stats: Stats | None) -> None:
        """Solves and stores one matrix, unless that was done before."""
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


def solve_matrix(
    weight: Tensor, row: PlanRow, solver: Solver, format: Format, stats: Stats | None
) -> tuple[QTensor, Outcome]:
    """Codes of a matrix, and what they came to."""
    start = time.perf_counter()
    said = [] if stats is None else list(stats.notes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PoiseWarning)
        found = solver.solve(weight, format, stats, name=row.name)
    said += [str(item.message) for item in caught if issubclass(item.category, PoiseWarning)]
    seconds = time.perf_counter() - start
    nearest = build("solver", "rtn").solve(weight, format, name=row.name) if stats is not None else None
    outcome = Outcome(
        name=row.name,
        format=str(row.format),
        solver=str(row.solver),
        seconds=round(seconds, 3),
        weight_error=relative_error(weight, found, None),
        output_error=relative_error(weight, found, stats) if stats is not None else math.nan,
        nearest=relative_error(weight, nearest, stats) if nearest is not None else math.nan,
        tokens=stats.n_tokens if stats is not None else 0,
        warnings=tuple(dict.fromkeys(said)),
    )
    return found, outcome


def relative_error(weight: Tensor, found: QTensor, stats: Stats | None) -> float:
    """tr (W - W') H (W - W')^T / tr W H W^T, with the Hessian, or the diagonal of it that is known, or without."""
    moment = None if stats is None else stats.second_moment
    hessian = None if stats is None else stats.hessian

    def part(rows: slice) -> tuple[float, float]:
        w = weight[rows].float()
        lost = w - found[rows].decode()
        if hessian is None:
            weigh = 1.0 if moment is None else moment
            return float((lost.square() * weigh).sum()), float((w.square() * weigh).sum())
        h = hessian
        if h.dim() == 3:
            h = h[min(len(h) - 1, (rows.start or 0) * len(h) // len(weight))]
        return float(((lost @ h) * lost).sum()), float(((w @ h) * w).sum())

    parts = map_slabs(part, weight.shape[0], weight.shape[1])
    whole = math.fsum(item[1] for item in parts)
    return math.fsum(item[0] for item in parts) / whole if whole else 0.0


class _Stream:
    """The two streams of hidden states, and the statistics on the way."""

    def __init__(self, work: _Work, calibration: Calibration) -> None:
        self.work = work
        self.calibration = calibration
        self.blocks = Blocks(work.checkpoint)
        wants = [build("solver", str(row.solver)).wants for row in work.rows.values()]
        self.feeds = any("hessian" in want for want in wants)
        """Whether layers read what quantized layers before them give; else all read the original's."""
        self.crosses = any("cross" in want for want in wants)
        folder = work.workspace.path / "stream"
        self.original = Spool(folder / "original")
        self.quantized = Spool(folder / "quantized")
        self.inputs = folder / "inputs"

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
            moments = _Moments(self.blocks)
            self._advance(names, moments.add)
            for linear in linears:
                self.work.solve(self.work.rows[linear.name], moments.stats(linear, self.calibration.hash))
            return
        read = {
            name: Spool(self.inputs / name, budget=READ)
            for name in names
            if self.crosses and self.blocks.dense(name)
        }
        if self.crosses:
            self._advance(list(read), lambda group, x: read[group].append(x))
        for together in groups:
            moments = _Moments(self.blocks, read)
            if together in open_:
                for hidden in self.quantized:
                    self.blocks.watch(hidden, together, moments.add, whole=False)
            for linear in linears:
                if linear.input_group in together:
                    row = self.work.rows[linear.name]
                    self.work.solve(row, moments.stats(linear, self.calibration.hash))
                    self.blocks.put(linear, self.work.workspace.load(row).decode())
            for name in together:
                read.pop(name, None)
        for number, hidden in enumerate(self.quantized):
            self.quantized[number] = self.blocks.run(hidden)

    def _solve_head(self) -> None:
        """A head of its own reads what the final norm gives; a tied one is a table of embeddings too, and has none."""
        heads = [linear for linear in self.work.linears.values() if linear.role == "head"]
        for linear in heads:
            if linear.name in self.work.rows:
                moments = _Moments(self.blocks, {} if self.feeds else None)
                for hidden in self.quantized if self.feeds else self.original:
                    moments.add(linear.input_group, self.blocks.finish(hidden).flatten(0, 1))
                self.work.solve(self.work.rows[linear.name], moments.stats(linear, self.calibration.hash))

    def _is_open(self, linears: list[Linear], group: str) -> bool:
        """Whether some matrix that reads this has no codes yet."""
        return any(
            linear.input_group == group and not self.work.workspace.has(self.work.rows[linear.name])
            for linear in linears
        )

    def _advance(self, groups: list[str], see: Any) -> None:
        """The original stream through the open block."""
        for number, hidden in enumerate(self.original):
            after = self.blocks.watch(hidden, groups, see, whole=True)
            assert after is not None  # the whole block ran
            self.original[number] = after


class _Moments:
    """Sums of what input groups read: squares, and with a dict of what the original read, products."""

    def __init__(self, blocks: Blocks, original: dict[str, Spool] | None = None) -> None:
        self.blocks = blocks
        self.full = original is not None
        self.original = original or {}
        self.count: dict[str, int] = {}
        self.batches: dict[str, int] = {}
        self.square: dict[str, Tensor] = {}
        self.hessian: dict[str, Tensor] = {}
        self.cross: dict[str, Tensor] = {}
        self.made: dict[str, Stats] = {}

    def add(self, group: str, x: Tensor) -> None:
        batch = self.batches[group] = self.batches.get(group, -1) + 1
        self.count[group] = self.count.get(group, 0) + len(x)
        self.square[group] = self.square.get(group, 0) + x.double().square().sum(0)
        if not self.full:
            return
        _add_product(self.hessian, group, x, x)
        if group in self.original:
            _add_product(self.cross, group, self.original[group][batch], x)

    def stats(self, linear: Linear, data_hash: str) -> Stats | None:
        """Of what a linear reads, to be asked when all was added; None if it read nothing.

        Raises:
            PoiseError: an activation was not finite; names the layer.
        """
        group = linear.input_group
        pool = self.blocks.pool_of(group)
        if not self.count.get(group) and (pool is None or not self.count.get(pool)):
            return None
        if group not in self.made:
            self.made[group] = self._make(linear, data_hash, pool)
        return self.made[group]

    def _make(self, linear: Linear, data_hash: str, pool: str | None) -> Stats:
        """Sums become means in place: of a wide layer there is no room for both."""
        group = linear.input_group
        notes = []
        n = self.count.get(group, 0)
        if pool is not None and n < FEW * linear.columns:
            notes.append(f"{n} tokens reached this expert: it also counts what all experts of its layer read")
            self._share(group, pool, FEW * linear.columns - n)
        elif self.full and n < FEW * linear.columns:
            notes.append(
                f"{n} tokens for {linear.columns} inputs: fewer than {FEW} each, the Hessian is poorly known"
            )
        n = self.count[group]
        moment = (self.square.pop(group) / n).float()
        if not bool(torch.isfinite(moment).all()):
            refuse_damaged(self.blocks.checkpoint)
            raise PoiseError(
                f"{linear.name}: its inputs are not finite on the calibration text; is the model sound?"
            )
        return Stats(
            second_moment=moment,
            n_tokens=n,
            data_hash=data_hash,
            hessian=self.hessian.pop(group).div_(n) if self.full else None,
            cross=self.cross.pop(group).div_(n) if group in self.cross else None,
            notes=tuple(notes),
        )

    def _share(self, group: str, pool: str, lacking: int) -> None:
        """An expert that few tokens reached also counts what all experts of its layer read.

        With n tokens of its own, fewer than FEW an input, it takes FEW an input less n from the average of the layer: its
        own statistics decide as far as there are some, and one that was never chosen gets the average alone.
        """
        share = lacking / self.count[pool]
        for sums in (self.square, self.hessian) if self.full else (self.square,):
            own, all_of_them = sums.get(group), sums[pool]
            sums[group] = all_of_them * share if own is None else own + all_of_them * share
        self.count[group] = self.count.get(group, 0) + lacking


def _add_product(sums: dict[str, Tensor], group: str, a: Tensor, b: Tensor) -> None:
    if group in sums:
        sums[group].addmm_(a.T, b)
    else:
        sums[group] = a.T @ b


def refuse_damaged(checkpoint: Checkpoint) -> None:
    """Names the weight that made activations infinite, if it is one."""
    for name in checkpoint.tensors():
        if not bool(torch.isfinite(checkpoint.read(name)).all()):
            raise FormatError(f"{name}: holds NaN or infinite weights; the checkpoint is damaged")
