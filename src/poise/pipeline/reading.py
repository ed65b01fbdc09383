"""What a model reads for a plan: how much text, in windows of which length."""

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from poise.calibration.generated import write_windows
from poise.calibration.text import Text, load_text
from poise.core.checkpoint import Checkpoint
from poise.core.errors import PoiseWarning
from poise.core.plan import Plan
from poise.core.precision import product_dtype, product_name
from poise.core.registry import build, get
from poise.core.run import available_memory
from poise.pipeline.progress import Progress
from poise.pipeline.stream import Calibration
from poise.pipeline.transforming import needs_text
from poise.pipeline.workspace import Workspace
from poise.training.distill import distill_of

DIAGONAL_WINDOW = 256
"""Tokens of a window of calibration text, where only second moments are wanted."""

HESSIAN_WINDOW = 512
"""Likewise for Hessians."""

BUILT_IN_TOKENS = 2500
"""Hardly more than the built-in text has; second moments need no more."""

HESSIAN_TOKENS = 16384
"""Tokens that Hessians need."""

WRITES = 65536
"""Tokens that the model writes at most, unless for training: writing takes longer than solving."""

SELF = "self"
"""Asks for text that the model writes itself."""

SEED = 0
"""Of what the model writes."""

PASSAGE = 32
"""Tokens of a given window from which the model goes on."""

ROOM = 0.5
"""Share of the free memory that a model may take to write its own text when nobody asked for that."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a model reads for one plan.

    Attributes:
        text: None for text that the model writes itself.
    """

    checkpoint: Checkpoint
    plan: Plan
    text: Text | None

    @property
    def length(self) -> int:
        """Tokens of a window."""
        length = HESSIAN_WINDOW if wants_hessian(self.plan) or self.plan.tune else DIAGONAL_WINDOW
        return min(length, self.checkpoint.context or length)

    @property
    def hash(self) -> str:
        """Of the text, or of what determines what the model writes."""
        if self.text is not None:
            return self.text.hash
        return hashlib.sha256(f"{SELF} {SEED} {self.tokens} {self.length}".encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """That are wanted in all, of a text or of what the model writes."""
        if self.text is not None:
            return max(tokens_of(self.plan), self._trained)
        return max(tokens_of(self.plan), self._fresh) if self.plan.tune else min(tokens_of(self.plan), WRITES)

    @property
    def _trained(self) -> int:
        """Tokens that training would read without reading any twice."""
        return distill_of(self.plan.tune).tokens if self.plan.tune else 0

    @property
    def _fresh(self) -> int:
        """Tokens that training wants, so that none is read too often."""
        return self._trained // distill_of(self.plan.tune).reads if self.plan.tune else 0

    @cached_property
    def given(self) -> list[list[int]]:
        """Windows of the text, as many as are wanted."""
        if self.text is None or not reads(self.plan):
            return []
        limit = max(1, self.tokens // self.length)
        return self.text.windows(self.checkpoint.tokenizer(), self.length, limit)

    @property
    def lacking(self) -> int:
        """Windows that the model writes itself: all, or what a text lacks for training."""
        if self.text is None:
            return max(1, self.tokens // self.length) if reads(self.plan) else 0
        return max(0, self._fresh // self.length - len(self.given))

    @property
    def passages(self) -> list[list[int]]:
        """What the model goes on from where a text lacks some: beginnings of its windows, but of those that will judge.

        None if all of them will: the model then opens its texts itself.
        """
        if not self.given or self.plan.tune is None:
            return []
        judging = distill_of(self.plan.tune).judging(len(self.given) + self.lacking)
        length = min(PASSAGE, self.length // 2)
        return [window[:length] for window in self.given[: max(0, len(self.given) - judging)]]

    def calibration(self, workspace: Workspace, progress: Progress) -> Calibration | None:
        """All windows, if the plan needs any."""
        if not reads(self.plan):
            return None
        written = self._written(workspace, progress) if self.lacking else []
        if self.text is None:
            return Calibration(windows=written, hash=self.hash)
        return Calibration(windows=self.given, hash=self.hash, written=written)

    def _written(self, workspace: Workspace, progress: Progress) -> list[list[int]]:
        """What the model writes, once for a run."""
        known = workspace.load_tensors("written")
        if known is None:
            known = {"tokens": torch.tensor(self._write(progress), dtype=torch.int32)}
            workspace.store_tensors("written", known)
        found: list[list[int]] = known["tokens"].tolist()
        return found

    def _write(self, progress: Progress) -> list[list[int]]:
        tokenizer = self.checkpoint.tokenizer()
        opening = tokenizer("")["input_ids"][:1]
        embedding = next(linear for linear in self.checkpoint.linears() if linear.role == "embedding")
        with get("engine", "torch")(dtype=product_name()) as engine:
            engine.load(self.checkpoint)
            return write_windows(
                engine.writer,
                windows=self.lacking,
                length=self.length,
                opening=opening,
                passages=self.passages,
                banned=sorted(set(tokenizer.all_special_ids)),
                vocabulary=embedding.rows,
                seed=SEED,
                progress=lambda done, total: progress("write calibration text", done, total),
            )


def reading_of(checkpoint: Checkpoint, plan: Plan, calibration: str | Path | None) -> Reading:
    """What a plan's model reads: a file, or what is fitting where nothing was given.

    Second moments need little, and some plans want no more for Hessians: the short text that comes with Poise serves them.
    For others, and for training, the model writes its own text, if it has room to run in memory.

    Raises:
        UsageError: the file cannot be used.
    """
    if calibration == SELF:
        return Reading(checkpoint=checkpoint, plan=plan, text=None)
    if calibration is not None:
        tokenizer = checkpoint.tokenizer()
        return Reading(
            checkpoint=checkpoint, plan=plan, text=load_text(calibration, "calibration", tokenizer)
        )
    if tokens_of(plan) > BUILT_IN_TOKENS or plan.tune is not None:
        need = product_dtype().itemsize * sum(info.numel for info in checkpoint.tensors().values())
        if need < ROOM * available_memory():
            return Reading(checkpoint=checkpoint, plan=plan, text=None)
        warnings.warn(
            f"the model would need {need / 1e9:.1f} GB to write its own calibration text; the short built-in one is too "
            "little for Hessians: give --calibration FILE",
            PoiseWarning,
            stacklevel=2,
        )
    return Reading(checkpoint=checkpoint, plan=plan, text=load_text(None, "calibration"))


def tokens_of(plan: Plan) -> int:
    """Tokens that statistics are collected on, if the text has as many."""
    return plan.tokens or (HESSIAN_TOKENS if wants_hessian(plan) else BUILT_IN_TOKENS)


def wants_hessian(plan: Plan) -> bool:
    """Whether a planned solver or a transform uses products of inputs."""
    needs = [build("transform", spec).needs for spec in plan.transforms]
    return any("hessian" in build("solver", str(row.solver)).wants for row in plan.quantized) or any(
        "hessian" in need for need in needs
    )


def wants_stats(plan: Plan) -> bool:
    """Whether a planned solver uses any statistics."""
    return any(build("solver", str(row.solver)).wants for row in plan.quantized)


def reads(plan: Plan) -> bool:
    """Whether a plan needs text at all: for statistics, for transforms, or for training."""
    return wants_stats(plan) or plan.tune is not None or needs_text(plan.transforms)
