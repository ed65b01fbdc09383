"""Gradient descent that keeps what was best and goes on where it was interrupted."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALL = 1e-16
"""Adam's epsilon: gradients of single weights are far below the usual 1e-8."""
WARMUP = 8
"""Steps until the learning rate is reached."""
FLOOR = 0.05
"""Share of the learning rate that is left at the end."""


class Descent:
    """Adam with a cosine schedule. (Kingma and Ba 2015, arXiv 1412.6980; Loshchilov and Hutter 2017, arXiv 1608.03983.)

    Args:
        groups: as torch's optimizers take them: values, with a learning rate each.
        steps: that the schedule has.
        windows: how many there are to draw from; none is drawn again before all were.
        seed: of the order of windows.
        kept: file of ``save``; a descent whose file is there goes on from it, to the same result.

    Attributes:
        step: steps that are done.
        now: what was judged last.
        least: of what was judged; ``best_step`` is when.
        before: what was judged first.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, steps: int, windows: int, seed: int, kept: Path | None
    ) -> None:
        self.values: list[Tensor] = [value for group in groups for value in group["params"]]
        for value in self.values:
            value.requires_grad_(True)
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=SMALL, fused=True)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.steps, self.windows, self.kept = steps, windows, kept
        self.dice = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.step, self.best_step = 0, 0
        self.before, self.now, self.least = math.nan, math.nan, math.inf
        self.best: list[Tensor] = []
        if kept is not None and kept.exists():
            self._load(kept)

    def draw(self, count: int) -> list[int]:
        """Windows of the next step."""
        while len(self.order) < count:
            self.order += torch.randperm(self.windows, generator=self.dice).tolist()
        found, self.order = self.order[:count], self.order[count:]
        return found

    def descend(self, loss: Tensor) -> None:
        """One step."""
        self.step += 1
        share = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1, self.step / WARMUP) * (FLOOR + (1 - FLOOR) * share)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def judged(self, loss: float) -> None:
        """Keeps the values of now if none were better; the first call is for those before any step."""
        self.now = loss
        if self.step == 0:
            self.before = loss
        if self.step == 0 or loss < self.least:
            self.least, self.best_step = loss, self.step
            self.best = [value.detach().clone() for value in self.values]

    def save(self) -> None:
        """Keeps the whole state, if there is a file for it."""
        if self.kept is None:
            return
        numbers = {
            name: getattr(self, name) for name in ("step", "best_step", "before", "now", "least", "order")
        }
        state = {
            "numbers": numbers,
            "values": [value.detach() for value in self.values],
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "dice": self.dice.get_state(),
        }
        unfinished = self.kept.with_suffix(".new")
        torch.save(state, unfinished)
        os.replace(unfinished, self.kept)

    def _load(self, kept: Path) -> None:
        state = torch.load(kept, weights_only=True)
        for name, number in state["numbers"].items():
            setattr(self, name, number)
        for value, before in zip(self.values, state["values"], strict=True):
            value.data.copy_(before)
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.dice.set_state(state["dice"])

    def finish(self) -> None:
        """Values become the best; the file stays until what was made of them is safe."""
        for value, best in zip(self.values, self.best, strict=True):
            value.data.copy_(best)
