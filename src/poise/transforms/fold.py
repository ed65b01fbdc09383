"""Weights of norms go into the matrices that read them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from poise.core.topology import Norm, Topology
from poise.core.transform import Material, Read, Rewrite, Transform


@dataclass(frozen=True, kw_only=True)
class Fold(Transform):
    """W diag(g) x = W (g * x): columns of the readers are multiplied by the norm's weight, which becomes one. (Ashkboos et
    al. 2024, QuaRot, arXiv 2404.00456, section 4, stage 1a.)

    Norms that something besides matrices reads stay as they are, and so does one that a tied head reads, and one with a
    bias: its readers would need biases of their own.
    """

    def refuses(self, topology: Topology) -> str | None:
        if any(foldable(norm) for norm in topology.norms):
            return None
        return "no norm of this model is read by matrices alone"

    def rewrites(self, material: Material) -> Sequence[Rewrite]:
        norms = [norm for norm in material.topology.norms if foldable(norm)]
        return [rewrite for norm in norms for rewrite in folded(norm, material.read)]


def foldable(norm: Norm) -> bool:
    """Whether the weight of a norm can go into its readers."""
    return norm.only and norm.bias is None


def folded(norm: Norm, read: Read) -> list[Rewrite]:
    """What folds one norm."""
    factor = read(norm.weight).double().flatten() + (1 - norm.unit)
    plain = torch.full_like(factor, norm.unit)
    return [
        *(Rewrite(name=name, kind="columns", value=factor) for name in norm.readers),
        Rewrite(name=norm.weight, kind="set", value=plain),
    ]
