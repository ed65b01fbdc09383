"""Migration of activation outliers into weights, for formats whose activations are rounded too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from poise.core.errors import UsageError
from poise.core.topology import Topology
from poise.core.transform import Material, Rewrite, Transform
from poise.transforms._scales import balanced, scaled_norm


@dataclass(frozen=True, kw_only=True)
class Smoothquant(Transform):
    """s_j = max|X_j|^a / max|W_j|^(1 - a): norms give x / s, and the columns of what reads them are multiplied by s. (Xiao
    et al. 2022, SmoothQuant, arXiv 2211.10438, equation 4.)

    Attributes:
        strength: a; 0.5 shares the difficulty equally, models with strong outliers take 0.75 to 0.9.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"largest"})

    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UsageError(f"strength is between 0 and 1, got {self.strength}")

    def refuses(self, topology: Topology) -> str | None:
        if any(norm.only for norm in topology.norms):
            return None
        return "no norm is read by matrices alone"

    def rewrites(self, material: Material) -> Sequence[Rewrite]:
        done: list[Rewrite] = []
        for norm in material.topology.norms:
            known = [name for name in norm.readers if name in material.stats]
            if not norm.only or not known:
                continue
            inputs = material.stats[known[0]].largest
            assert inputs is not None  # it was asked for
            columns = torch.stack([material.read(name).abs().amax(0) for name in norm.readers]).amax(0)
            tiny = torch.finfo(torch.float32).tiny
            factor = inputs.double().clamp(min=tiny) ** self.strength
            factor = factor / columns.double().clamp(min=tiny) ** (1 - self.strength)
            dead = (inputs == 0) | (columns == 0)
            factor[dead] = 1.0
            done += scaled_norm(norm, factor if bool(dead.any()) else balanced(factor), material.read)
        return done
