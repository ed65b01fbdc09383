"""NVFP4: E2M1 elements, 16 to an E4M3 scale, and one float32 scale for the tensor (NVIDIA, TensorRT Model Optimizer).

The largest element is 6. A block may also be scaled so that its largest weight becomes 4, which puts the levels
between 4 and 6, where E2M1 is coarse, out of use: "four over six" (Cook et al. 2025, arXiv 2512.02010).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.format import Params
from poise.core.slabs import map_slabs
from poise.formats._grid import Grid
from poise.formats._minifloat import minifloat
from poise.formats._search import best_candidate

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""Values of the positive codes, ascending, up to 448."""
BETWEEN = (E4M3[1:] + E4M3[:-1]) / 2
LARGEST = 6.0


@dataclass(frozen=True, kw_only=True)
class Nvfp4(Grid):
    """w = tensor_scale * e4m3(scale) * v with v of E2M1; 4.5 bits a weight. Rows are multiples of 16.

    Params: ``scale`` uint8 [rows, columns / 16], bit patterns of E4M3 without sign; ``tensor_scale`` [1, 1] float32,
    max |w| / (6 * 448), shared by all rows.

    Attributes:
        tensor_scale: whether there is one. Without, blocks of small weights lose precision or vanish: the smallest
            E4M3 value is 2^-9.
        four_over_six: whether ``cover`` takes the better of the two scales for each block. ``fit`` tries both in
            any case, and their neighbours.
    """

    bits = 4
    group = 16
    scale = "e4m3"

    tensor_scale: bool = True
    four_over_six: bool = False

    @property
    def block(self) -> int:
        return 16

    @property
    def tile_rows(self) -> int:
        return 0 if self.tensor_scale else 1

    @property
    def shared(self) -> frozenset[str]:
        return frozenset({"tensor_scale"} if self.tensor_scale else ())

    @property
    def lopsided(self) -> bool:
        return False

    def values(self) -> Tensor:
        return minifloat(2, 1)

    def cover(self, weight: Tensor) -> Params:
        low, high = self.groups.extremes(weight)
        largest = torch.maximum(high, -low)
        unit = self._unit(largest)
        codes = _nearest(largest / LARGEST / unit)
        if self.four_over_six and weight.numel():
            choices = torch.stack((codes, _nearest(largest / 4 / unit)), dim=-1)
            codes = self._best(weight, None, choices, unit)
        return self._params(codes, unit)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        low, high = self.groups.extremes(weight)
        largest = torch.maximum(high, -low)
        unit = self._unit(largest)
        if not weight.numel():
            return self._params(_nearest(largest), unit)
        wide, narrow = _nearest(largest / 4 / unit), _nearest(largest / 9 / unit)
        steps = torch.linspace(0, 1, TRIES)
        choices = (narrow.unsqueeze(-1) + steps * (wide - narrow).unsqueeze(-1)).round().to(torch.uint8)
        return self._params(self._best(weight, importance, choices, unit), unit)

    def _unit(self, largest: Tensor) -> Tensor:
        """The tensor's scale, [1, 1]; 1 when there is none, or nothing but zeros."""
        top = largest.amax() if self.tensor_scale and largest.numel() else largest.new_zeros(())
        unit = top / (LARGEST * E4M3[-1])
        return torch.where(unit > 0, unit, 1.0).view(1, 1)

    def _best(self, weight: Tensor, importance: Tensor | None, choices: Tensor, unit: Tensor) -> Tensor:
        """The code of least squared error of every block, out of [rows, groups, k]."""

        def best(rows: slice) -> Tensor:
            x, w, n = self.groups.view(weight[rows], importance)
            scales = (E4M3[choices[rows].int()] * unit).contiguous()
            found = best_candidate(x.numpy(), w.numpy(), n, self.table.levels, scales.numpy())
            return choices[rows].gather(-1, torch.from_numpy(found).unsqueeze(-1)).squeeze(-1)

        return torch.cat(map_slabs(best, *weight.shape))

    def _params(self, codes: Tensor, unit: Tensor) -> Params:
        params = {"scale": codes.to(torch.uint8)}
        return {**params, "tensor_scale": unit} if self.tensor_scale else params

    @property
    def linear(self) -> tuple[str, ...]:
        return ()

    def at(self, params: Params, columns: slice) -> Params:
        return {**params, "scale": self.groups.at(params["scale"], columns)}

    def effective(self, params: Params) -> Tensor:
        scale = E4M3[params["scale"].int()]
        return scale * params["tensor_scale"] if "tensor_scale" in params else scale

    def bits_per_weight(self, rows: int, columns: int) -> float:
        total = rows * columns * 4.5 + 32 * self.tensor_scale
        return total / max(1, rows * columns)


TRIES = 12
"""Scales tried for a block, from its largest weight at 9 (clipped to 6) to its largest at 4."""


def _nearest(values: Tensor) -> Tensor:
    """Codes of the nearest E4M3 values, saturating."""
    return torch.bucketize(values.contiguous(), BETWEEN).to(torch.uint8)
