"""A head of its own for a model that uses its embedding twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from poise.core.topology import Topology
from poise.core.transform import Material, Rewrite, Transform


@dataclass(frozen=True, kw_only=True)
class Untie(Transform):
    """Copies the embedding to the head, which folding and rotating then treat apart. The model grows by that copy."""

    unties: ClassVar[bool] = True

    def refuses(self, topology: Topology) -> str | None:
        return None if topology.head is None else "the head has a tensor of its own already"

    def rewrites(self, material: Material) -> Sequence[Rewrite]:
        return ()
