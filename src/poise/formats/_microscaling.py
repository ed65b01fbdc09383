"""OCP Microscaling (MX) v1.0: 32 elements of a small type share one power of two.

The specification (6.3) takes floor(log2(max |w|)) less the largest exponent of the element type, which clips what
is then above the largest element. ``cover`` does so. ``fit`` tries the neighbouring powers and keeps the one of
least squared error.
"""

import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._grid import Grid


class Microscaled(Grid):
    """Params: ``scale`` uint8 [rows, columns / 32], e for 2^(e - 127). Rows are multiples of 32."""

    group = 32
    scale = "e8m0"

    @property
    def block(self) -> int:
        return 32

    def cover(self, weight: Tensor) -> Params:
        low, high = self.groups.extremes(weight)
        largest = torch.maximum(high, -low)
        top = torch.frexp(torch.tensor(float(self.table.levels.values[-1]))).exponent - 1
        exponent = torch.frexp(largest).exponent - 1 - top
        exponent = torch.where(largest == 0, -127, exponent).clamp(-127, 127)
        return {"scale": (exponent + 127).to(torch.uint8)}
