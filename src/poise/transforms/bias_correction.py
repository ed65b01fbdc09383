"""Biases take back what rounding did to mean outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from poise.core.topology import Topology
from poise.core.transform import Material, Rewrite, Transform


@dataclass(frozen=True, kw_only=True)
class BiasCorrection(Transform):
    """b' = b + W E[x] - W' E[x'], x' what the layer reads when all before it is rounded and corrected. (Nagel et al. 2019,
    Data-Free Quantization, arXiv 1906.04721, section 4.2, with means from text in place of those from norms.)

    Matrices without a bias stay as they are: engines have no place for a new one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"mean"})
    after: ClassVar[bool] = True

    def refuses(self, topology: Topology) -> str | None:
        return (
            None
            if topology.bias_of
            else "no matrix of this model has a bias, and engines have no place for a new one"
        )

    def rewrites(self, material: Material) -> Sequence[Rewrite]:
        done = []
        for name, (weight, stats) in material.rounded.items():
            bias, before = material.topology.bias_of.get(name), material.stats.get(name)
            if bias is None or before is None or before.mean is None or stats.mean is None:
                continue
            wanted = material.read(name).double() @ before.mean.double()
            change = wanted - weight.double() @ stats.mean.double()
            done.append(Rewrite(name=bias, kind="add", value=change))
        return done
