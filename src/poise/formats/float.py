"""Floating-point pass-through: the codes are the weights, cast."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.errors import FormatError, UsageError
from poise.core.format import Format, Params

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Float(Format):
    """IEEE float32 and float16, or bfloat16: ``decode(codes) = codes`` in float32. No parameters.

    Attributes:
        dtype: ``float16``, ``bfloat16`` or ``float32``.
    """

    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def bits(self) -> float:  # type: ignore[override]  # follows from dtype
        return 8 * DTYPES[self.dtype].itemsize

    def group_of(self, columns: int) -> int:
        return columns

    def cover(self, weight: Tensor) -> Params:
        return {}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        return {}

    def at(self, params: Params, columns: slice) -> Params:
        return params

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        if noise is not None:
            return self._by_chance(weight, noise)
        cast = weight.to(DTYPES[self.dtype])
        if bool(torch.isinf(cast).any()):
            raise FormatError(
                f"holds weights up to {float(weight.abs().max()):.3g}, more than {self.dtype} represents: "
                "use float(dtype='bfloat16') or float(dtype='float32')"
            )
        return cast

    def _by_chance(self, weight: Tensor, noise: Tensor) -> Tensor:
        """One of the two values around each weight, the nearer one the likelier."""
        nearest = self.round(weight, {})
        over = nearest.float() > weight
        other = torch.nextafter(nearest, torch.where(over, -torch.inf, torch.inf).to(nearest.dtype))
        low, high = torch.where(over, other, nearest), torch.where(over, nearest, other)
        share = (weight - low.float()) / (high.float() - low.float())
        return torch.where(noise < share, high, low)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float()

    def bits_per_weight(self, rows: int, columns: int) -> float:
        return self.bits

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"values": codes}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        return stored["values"], {}
