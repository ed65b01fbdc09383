"""Activation-aware scaling of channels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.core.format import Format
from poise.core.topology import Topology
from poise.core.transform import Material, Rewrite, Transform
from poise.transforms._scales import balanced, read_by, scaled_norm, scaled_pair, written_by

ROWS = 512
"""Rows of a matrix that are rounded to judge a scale: all of it would take as long for every candidate as solving it."""
SMALLEST = 1e-4
"""Of the largest mean input, below which a channel counts as this."""


@dataclass(frozen=True, kw_only=True)
class Awq(Transform):
    """Channels with large inputs are made larger before rounding, what writes them smaller: s = E[x^2]^(a/2), a from a
    grid, the one of least output error tr (W - W') H (W - W')^T summed over the matrices that read them. (Lin et al. 2023,
    AWQ, arXiv 2306.00978, equations 4 and 5.)

    Deviations: the error is that under the Hessian of all tokens, on at most 512 rows of each matrix; s goes by the root
    of the second moment, not the mean of magnitudes. The search for clipped ranges is that of the format, weighted by
    inputs, which every solver but ``rtn`` does anyway.

    Attributes:
        grid: values of a between 0 and 1.
        pairs: whether values and products are scaled too, not only what norms give.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment", "hessian"})

    grid: int = 20
    pairs: bool = True

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise UsageError(f"grid is at least 1, got {self.grid}")

    def refuses(self, topology: Topology) -> str | None:
        if any(norm.only for norm in topology.norms) or topology.pairs:
            return None
        return "no norm is read by matrices alone, and no matrix writes what one other reads"

    def rewrites(self, material: Material) -> Sequence[Rewrite]:
        done: list[Rewrite] = []
        for norm in material.topology.norms:
            readers = known(material, norm.readers)
            if norm.only and readers:
                moment = material.stats[readers[0]].second_moment
                factor = self._best(material, readers, moment, lambda scale: scale)
                done += [] if factor is None else scaled_norm(norm, factor, material.read)
        for pair in material.topology.pairs if self.pairs else ():
            if known(material, (pair.reader,)):
                moment = written_by(pair, material.stats[pair.reader].second_moment)
                factor = self._best(material, [pair.reader], moment, partial(read_by, pair))
                done += [] if factor is None else scaled_pair(pair, factor)
        return done

    def _best(
        self, material: Material, readers: list[str], moment: Tensor, columns: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """Factors of least error; None if none is better than leaving all as it is."""
        size = moment.double().sqrt()
        size = size.clamp(min=SMALLEST * float(size.max()))
        if not bool((size > 0).all()):
            return None
        weights = [sample(material.read(name)) for name in readers]
        best, least = None, torch.inf
        for step in range(self.grid + 1):
            factor = balanced(size ** (step / self.grid))
            lost = sum(
                output_error(
                    weight, columns(factor).float(), material.formats[name], material.stats[name].hessian
                )
                for name, weight in zip(readers, weights, strict=True)
            )
            if lost < least:
                best, least = (factor if step else None), lost
        return best


def known(material: Material, readers: Sequence[str]) -> list[str]:
    """Of these matrices the ones that are planned, with a Hessian of their inputs."""
    return [
        name
        for name in readers
        if name in material.formats
        and name in material.stats
        and material.stats[name].hessian is not None
        and material.formats[name].width
    ]


def sample(weight: Tensor) -> Tensor:
    """Some rows, evenly spaced."""
    step = max(1, len(weight) // ROWS)
    return weight[::step].float()


def output_error(weight: Tensor, factor: Tensor, format: Format, hessian: Tensor | None) -> float:
    """tr (W - W') H (W - W')^T, W' the rounded W diag(s) without the scale."""
    assert hessian is not None  # only readers with one are asked for
    turned = weight * factor
    params = format.cover(turned)
    lost = weight - format.decode(format.round(turned, params), params) / factor
    return float(((lost @ hessian) * lost).sum())
