"""What input groups read, summed up batch by batch into statistics."""

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.errors import FormatError, PoiseError
from poise.core.linear import Linear
from poise.core.squares import add_square, mirror
from poise.core.stats import Stats
from poise.pipeline.blocks import Blocks
from poise.pipeline.spool import Spool

FEW = 4
"""Tokens an input, below which a Hessian is called poorly known, and an expert starved."""

Weighed = dict[str, dict[str, Tensor | None]]
"""Input group -> matrix -> weights of tokens, [tokens, runs of rows]; None if they count alike."""


class Moments:
    """Sums of what input groups read: squares, and with a dict of what the original read, products.

    Args:
        blocks: the model that reads.
        original: what dense groups read in the original, batch by batch; None for squares alone.
        streams: what the residual stream held there where their outputs were added, of those that write to it.
        weighed: matrices that get products of their own, in which each token has a weight for each run of rows. Groups that
            are missing have none.
    """

    def __init__(
        self,
        blocks: Blocks,
        original: dict[str, Spool] | None = None,
        streams: dict[str, Spool] | None = None,
        weighed: Weighed | None = None,
    ) -> None:
        self.blocks = blocks
        self.weighed = weighed or {}
        self.full = original is not None
        self.original = original or {}
        self.streams = streams or {}
        self.count: dict[str, int] = {}
        self.batches: dict[str, int] = {}
        self.square: dict[str, Tensor] = {}
        self.hessian: dict[str, Tensor] = {}
        self.change: dict[str, Tensor] = {}
        self.drift: dict[str, Tensor] = {}
        self.sum: dict[str, Tensor] = {}
        self.largest: dict[str, Tensor] = {}
        self.made: dict[str, Stats] = {}

    def add(self, group: str, x: Tensor, stream: Tensor | None = None) -> None:
        """Takes one batch of what a group reads, [tokens, columns], and what the stream holds where it writes."""
        batch = self.batches[group] = self.batches.get(group, -1) + 1
        seen = slice(self.count.get(group, 0), self.count.get(group, 0) + len(x))
        self.count[group] = self.count.get(group, 0) + len(x)
        self.square[group] = self.square.get(group, 0) + x.square().sum(0).double()
        self.sum[group] = self.sum.get(group, 0) + x.sum(0).double()
        largest = x.abs().amax(0)
        self.largest[group] = largest.maximum(self.largest.get(group, largest))
        if not self.full:
            return
        before = self.original[group][batch] if group in self.original else None
        weighed = self.weighed.get(group, {})
        if not weighed or None in weighed.values():
            self._add_products(group, x, before)
            if stream is not None and group in self.streams:
                _add_product(self.drift, group, self.streams[group][batch] - stream, x)
        for name, weights in weighed.items():
            roots = () if weights is None else torch.split(weights[seen].sqrt(), 1, dim=1)
            for run, root in enumerate(roots):  # on both sides, so that the product is symmetric
                self._add_products(f"{name} {run}", x * root, None if before is None else before * root)

    def _add_products(self, key: str, x: Tensor, before: Tensor | None) -> None:
        """The difference to the original is multiplied, not the original: it is small, and so is what rounding leaves of it."""
        if key not in self.hessian:
            self.hessian[key] = torch.zeros(x.shape[1], x.shape[1])
        add_square(self.hessian[key], x)
        if before is not None:
            _add_product(self.change, key, before - x, x)

    def stats(self, linear: Linear, data_hash: str) -> Stats | None:
        """Of what a linear reads, to be asked when all was added; None if it read nothing.

        Raises:
            PoiseError: an activation was not finite; names the layer.
        """
        group = linear.input_group
        pool = self.blocks.pool_of(group)
        if not self.count.get(group) and (pool is None or not self.count.get(pool)):
            return None
        weights = self.weighed.get(group, {}).get(linear.name)
        if weights is not None:
            return self._make_weighed(linear, data_hash, weights.shape[1])
        if group not in self.made:
            self.made[group] = self._make(linear, data_hash, pool)
        return self.made[group]

    def _make_weighed(self, linear: Linear, data_hash: str, runs: int) -> Stats:
        """With matrices for each run of rows, or for the one that all rows are."""
        n = self.count[linear.input_group]
        keys = [f"{linear.name} {run}" for run in range(runs)]
        hessian = torch.stack([mirror(self.hessian.pop(key)) for key in keys]).div_(n)
        changes = [self.change.pop(key) for key in keys if key in self.change]
        cross = torch.stack(changes).div_(n).add_(hessian) if changes else None
        self._check(linear, hessian)
        return Stats(
            second_moment=hessian.diagonal(dim1=1, dim2=2).mean(0).clamp(min=0),
            n_tokens=n,
            data_hash=data_hash,
            hessian=hessian.squeeze(0),
            cross=None if cross is None else cross.squeeze(0),
            notes=self._doubts(linear),
        )

    def _make(self, linear: Linear, data_hash: str, pool: str | None) -> Stats:
        """Sums become means in place: of a wide layer there is no room for both."""
        group = linear.input_group
        notes: tuple[str, ...] = ()
        n = self.count.get(group, 0)
        if pool is not None and n < FEW * linear.columns:
            notes = (f"{n} tokens reached this expert: it also counts what all experts of its layer read",)
            self._share(group, pool, FEW * linear.columns - n)
        elif self.full:
            notes = self._doubts(linear)
        n = self.count[group]
        moment = (self.square.pop(group) / n).float()
        self._check(linear, moment)
        hessian = mirror(self.hessian.pop(group)).div_(n) if self.full else None
        change = self.change.pop(group).div_(n) if group in self.change else None
        return Stats(
            second_moment=moment,
            n_tokens=n,
            data_hash=data_hash,
            hessian=hessian,
            cross=None if change is None or hessian is None else change.add_(hessian),
            drift=self.drift.pop(group).div_(n) if group in self.drift else None,
            mean=(self.sum.pop(group) / n).float(),
            largest=self.largest.pop(group),
            notes=notes,
        )

    def _doubts(self, linear: Linear) -> tuple[str, ...]:
        """What is to be said about a Hessian of few tokens."""
        n = self.count[linear.input_group]
        few = f"{n} tokens for {linear.columns} inputs: fewer than {FEW} each, the Hessian is poorly known"
        return (few,) if n < FEW * linear.columns else ()

    def _check(self, linear: Linear, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            refuse_damaged(self.blocks.checkpoint)
            raise PoiseError(
                f"{linear.name}: its inputs are not finite on the calibration text; is the model sound?"
            )

    def _share(self, group: str, pool: str, lacking: int) -> None:
        """An expert that few tokens reached also counts what all experts of its layer read.

        With n tokens of its own, fewer than FEW an input, it takes FEW an input less n from the average of the layer: its
        own statistics decide as far as there are some, and one that was never chosen gets the average alone.
        """
        share = lacking / self.count[pool]
        for sums in (self.square, self.sum, self.hessian) if self.full else (self.square, self.sum):
            own, all_of_them = sums.get(group), sums[pool]
            sums[group] = all_of_them * share if own is None else own + all_of_them * share
        self.largest[group] = self.largest[pool].maximum(self.largest.get(group, self.largest[pool]))
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
