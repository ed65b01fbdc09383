"""A rotation of the residual stream that was learned."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.errors import UsageError
from poise.core.format import Format
from poise.core.topology import Topology
from poise.core.transform import Material, Rewrite, Transform
from poise.transforms._orthogonal import rotation
from poise.transforms.rotate import cannot_rotate, rotated_stream

ROWS = 64
"""Rows of a reader that are rounded at each step; of a writer, groups of columns that hold as many weights."""


@dataclass(frozen=True, kw_only=True)
class LearnedRotation(Transform):
    """R1, beginning with a randomised Hadamard matrix, by descent along the Cayley transform on the Stiefel manifold: R
    stays orthogonal at every step. What falls is the rounding error of all planned matrices that read or write the
    stream, relative to each one's size. (Liu et al. 2024, SpinQuant, arXiv 2405.16406, section 3.2; Li et al. 2020,
    Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform, arXiv 2002.01113.)

    Deviations: the loss is the error of weights, straight through the rounding, not that of the network; it needs no data
    and no activations.

    Attributes:
        steps: of descent, each on other rows.
        rate: angle of the first step, about; it falls to zero.
        seed: of signs and of the rows.
    """

    steps: int = 100
    rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rate <= 0:
            raise UsageError("steps is at least 1 and rate is positive")

    def refuses(self, topology: Topology) -> str | None:
        reason = cannot_rotate(topology)
        return None if reason is None else f"the residual stream cannot be rotated: {reason}"

    def rewrites(self, material: Material) -> Sequence[Rewrite]:
        return rotated_stream(material, self.learn(material))

    def learn(self, material: Material) -> Tensor:
        """The rotation, float64 [width, width]."""
        topology = material.topology
        parts = _parts(material)
        matrix = rotation("hadamard", topology.width, self.seed).float()
        if not parts:
            return matrix.double()
        dice = torch.Generator().manual_seed(self.seed)
        momentum = torch.zeros_like(matrix)
        for step in range(self.steps):
            slope = torch.zeros_like(matrix)
            for weight, format, writes in parts:
                pick = torch.randperm(len(weight), generator=dice)[:ROWS]
                slope += _slope(weight[pick], matrix, format, writes)
            momentum = 0.9 * momentum + slope
            matrix = _turned(matrix, momentum, self.rate * (1 - step / self.steps))
        return _orthogonal(matrix.double())


def _parts(material: Material) -> list[tuple[Tensor, Format, bool]]:
    """Readers with their norms folded, [rows, width], and writers, [runs of columns, width, columns of a group]."""
    topology, found = material.topology, []
    for norm in topology.norms:
        if not norm.residual:
            continue
        factor = material.read(norm.weight).float().flatten() + (1 - norm.unit)
        for name in norm.readers:
            format = material.formats.get(name)
            if format is not None and format.width == 1:
                found.append((material.read(name).float() * factor, format, False))
    for name in topology.writers:
        format = material.formats.get(name)
        if format is None or format.width != 1:
            continue
        weight = material.read(name).float()
        group = format.group_of(weight.shape[1])
        if len(weight) == topology.width and weight.shape[1] % group == 0:
            runs = weight.view(topology.width, -1, group).transpose(0, 1)
            found.append((runs.contiguous(), format, True))
    return found


def _slope(weight: Tensor, matrix: Tensor, format: Format, writes: bool) -> Tensor:
    """Gradient of the relative rounding error by the rotation, straight through the rounding."""
    if writes:
        weight = weight[: max(1, ROWS // weight.shape[2])]
        columns = weight.transpose(0, 1).flatten(1)
        turned = matrix.T @ columns
        lost = turned - _rounded(turned, format)
        return columns @ lost.T / turned.square().sum()
    turned = weight @ matrix
    lost = turned - _rounded(turned, format)
    return weight.T @ lost / turned.square().sum()


def _rounded(weight: Tensor, format: Format) -> Tensor:
    params = format.cover(weight)
    return format.decode(format.round(weight, params), params)


def _turned(matrix: Tensor, slope: Tensor, angle: float) -> Tensor:
    """One step along the Cayley transform, (I + A/2)^-1 (I - A/2) R; ``angle`` is the norm of A."""
    skew = slope @ matrix.T
    skew = skew - skew.T
    size = float(torch.linalg.matrix_norm(skew)) / 2**0.5
    if size == 0:
        return matrix
    half = skew * (angle / size / 2)
    one = torch.eye(len(matrix))
    found: Tensor = torch.linalg.solve(one + half, (one - half) @ matrix)
    return found


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix: a hundred steps in float32 leave an error of 1e-5."""
    u, _, v = torch.linalg.svd(matrix)
    found: Tensor = u @ v
    return found
