"""The quantized stream through the open block: to where each input group reads, and on when the matrices there are solved."""

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.linear import Linear
from poise.core.plan import Plan
from poise.pipeline.blocks import Blocks, Reached, Watch
from poise.pipeline.spool import Spool
from poise.training.distill import distill_of

HELD = 1 << 30
"""Bytes that runs which wait inside a block may hold in all, if nothing else takes more."""
READ = 1 << 25
"""Bytes of what one input group read that stay in memory."""


def held(linears: Iterable[Linear], tokens: int) -> int:
    """Bytes of all that the linears of a block put out, which is more than a run holds at any time."""
    return 4 * tokens * sum(linear.rows for linear in linears)


def room(checkpoint: Checkpoint, plan: Plan) -> int:
    """Bytes that runs may hold: what training will take afterwards, if there is one, and little otherwise."""
    return HELD if plan.tune is None else max(HELD, distill_of(plan.tune).memory(checkpoint))


def can_wait(linears: Sequence[Linear], tokens: int, most: int) -> bool:
    """Whether runs can wait in a block, given all its linears and the bytes they may hold: there is room, and no experts, whose
    inputs are known only when they have run."""
    return held(linears, tokens) <= most and not any(linear.role.startswith("expert.") for linear in linears)


class Reads:
    """What input groups read, batch by batch, and what the residual stream holds where they write to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs: dict[str, Spool] = {}
        self.streams: dict[str, Spool] = {}

    def keep(self, group: str, x: Tensor, stream: Tensor | None) -> None:
        """Takes a batch; see ``Watch``."""
        self._spool(self.inputs, group, self.folder / group).append(x)
        if stream is not None:
            self._spool(self.streams, group, self.folder / f"{group}.stream").append(stream)

    def _spool(self, spools: dict[str, Spool], group: str, folder: Path) -> Spool:
        return spools.setdefault(group, Spool(folder, budget=READ))

    def drop(self, groups: Sequence[str]) -> None:
        """Frees what some groups read."""
        for spools in (self.inputs, self.streams):
            for group in groups:
                if group in spools:
                    spools.pop(group).close()


class Waiting:
    """Every batch runs once, and waits wherever matrices are to be solved. That takes room for all that the block computes.

    Args:
        hidden: what enters the block, batch by batch; becomes what leaves it.
        groups: input groups in the order in which the block reaches them, none of them of experts.
        writers: see ``Blocks.watch``.
    """

    def __init__(self, blocks: Blocks, hidden: Spool, groups: Sequence[str], writers: Sequence[str]) -> None:
        self.hidden = hidden
        self._runs = [_Run(blocks, batch, groups, writers) for batch in hidden]

    def read(self, together: Sequence[str], see: Watch | None) -> None:
        """Shows what input groups read, to whom that matters."""
        if see is not None:
            for run in self._runs:
                run.read(together[-1], see)

    def leave(self) -> None:
        """To the end of the block."""
        for number, run in enumerate(self._runs):
            self.hidden[number] = run.leave()

    def close(self) -> None:
        """Ends what still waits."""
        for run in self._runs:
            run.stop()


class _Run:
    """One batch on its way through the block. A module's forward cannot be left and entered again, but a thread can wait in it."""

    def __init__(self, blocks: Blocks, hidden: Tensor, groups: Sequence[str], writers: Sequence[str]) -> None:
        self.blocks, self.hidden, self.groups, self.writers = blocks, hidden, groups, writers
        self._shown: tuple[str, Tensor, Tensor | None] | None = None
        self._out: Tensor | None = None
        self._failed: BaseException | None = None
        self._stopped = False
        self._turn, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, name="block", daemon=True)

    def _work(self) -> None:
        try:
            self._out = self.blocks.watch(
                self.hidden, self.groups, self._wait, whole=True, writers=self.writers
            )
        except BaseException as error:
            self._failed = error
        self._shown = None
        self._arrived.release()

    def _wait(self, group: str, x: Tensor, stream: Tensor | None) -> None:
        self._shown = group, x, stream
        self._arrived.release()
        self._turn.acquire()
        if self._stopped:
            raise Reached

    def _go_on(self) -> None:
        """Until it waits again or has ended; products are rounded meanwhile as the block's are, and only then."""
        self._shown = None
        if self._out is not None:
            return
        with self.blocks.products():
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._turn.release()
            self._arrived.acquire()
        if self._failed is not None:
            raise self._failed

    def read(self, group: str, see: Watch) -> None:
        self._go_on()
        while self._shown is not None and self._shown[0] != group:
            self._go_on()
        if self._shown is not None:
            with self.blocks.products():
                see(*self._shown)

    def leave(self) -> Tensor:
        self._go_on()
        while self._shown is not None:
            self._go_on()
        assert self._out is not None  # it ran to the end
        return self._out

    def stop(self) -> None:
        """Wherever it is, also on its way."""
        self._stopped = True
        if self._thread.ident is not None:
            with self.blocks.products():  # as when it began: what it leaves behind is undone
                self._turn.release()
                self._thread.join()


class Repeated:
    """Every batch runs anew for each input group, as far as that: nothing but hidden states is held.

    Args: as those of ``Waiting``, and
        folder: for what the last writer of the block reads and adds to, so that the last run goes no further than it.
    """

    def __init__(
        self,
        blocks: Blocks,
        hidden: Spool,
        groups: Sequence[Sequence[str]],
        writers: Sequence[str],
        folder: Path,
    ) -> None:
        self.blocks, self.hidden, self.writers = blocks, hidden, writers
        self.last = Reads(folder)
        self._ends = list(groups[-1]) if groups and list(groups[-1]) == list(writers[-1:]) else []

    def read(self, together: Sequence[str], see: Watch | None) -> None:
        """Shows what input groups read, to whom that matters."""
        sees = [see] if see is not None else []
        if list(together) == self._ends:
            sees.append(self.last.keep)

        def show(group: str, x: Tensor, stream: Tensor | None) -> None:
            for each in sees:
                each(group, x, stream)

        if sees:
            for hidden in self.hidden:
                self.blocks.watch(hidden, together, show, whole=False, writers=self.writers)

    def leave(self) -> None:
        """To the end of the block."""
        for number, hidden in enumerate(self.hidden):
            if self.last.inputs:
                ((path, x),) = self.last.inputs.items()
                after = self.last.streams[path][number] + self.blocks.run_linear(path, x[number])
                self.hidden[number] = after.view(hidden.shape)
            else:
                self.hidden[number] = self.blocks.run(hidden)

    def close(self) -> None:
        """Frees what it kept."""
        self.last.drop(list(self.last.inputs))


def passes_of(
    blocks: Blocks,
    hidden: Spool,
    linears: Sequence[Linear],
    groups: Sequence[Sequence[str]],
    writers: Sequence[str],
    tokens: int,
    most: int,
    folder: Path,
) -> Waiting | Repeated:
    """How hidden states go through the open block: with stops, if runs can wait there; to be closed.

    Args:
        linears: all of the block.
        groups: input groups in the order in which they are read; those in one list together.
        tokens: of all hidden states.
        most: bytes that runs may hold; see ``room``.
        folder: see ``Repeated``.
    """
    if can_wait(linears, tokens, most):
        return Waiting(blocks, hidden, [name for together in groups for name in together], writers)
    return Repeated(blocks, hidden, groups, writers, folder)
