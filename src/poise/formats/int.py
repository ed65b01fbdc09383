"""Uniform affine integers, the grid that every engine knows.

Three reconstruction formulas, for code q, scale s and a group's offset:

    symmetric                        w = s * q          q in [-2^(b-1), 2^(b-1) - 1]
    asymmetric, zero="integer"       w = s * (q - z)    q, z in [0, 2^b - 1]
    asymmetric, zero="minimum"       w = s * q + m      q in [0, 2^b - 1], m stored like s

The symmetric scale is signed: the weight of largest magnitude becomes the code -2^(b-1), which is the
one level that has no mirror image. All 2^b levels are used, and a constant group is exact because its
scale is the constant divided by a power of two. (llama.cpp's Q4_0 and AutoRound's "full range" do so.)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from poise.core.bits import pack_bits, unpack_bits, words
from poise.core.errors import FormatError, UsageError
from poise.core.format import Format, Params

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Int(Format):
    """Integers of ``bits`` bits with a scale for each group of inputs.

    Params: ``scale`` [rows, groups], and for asymmetric grids ``zero`` uint8 or ``minimum`` (dtype of
    the scale), of the same shape; one row and one group for ``group="tensor"``.

    Attributes:
        bits: 1 to 8.
        group: inputs that share a scale, 16 to 256 (the last group of a row may be shorter), or
            ``"channel"`` (one scale an output) or ``"tensor"``.
        symmetric: whether zero is fixed at code 0.
        zero: what an asymmetric grid stores as its offset.
        scale: dtype of the scales; ``"auto"`` lets the container choose.
    """

    bits: int
    group: int | str
    symmetric: bool = True
    zero: str = "integer"
    scale: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise UsageError(f"int takes 1 to 8 bits, got {self.bits!r}")
        if self.group not in ("channel", "tensor") and not (
            isinstance(self.group, int) and 16 <= self.group <= 256
        ):
            raise UsageError(f'group is 16 to 256, "channel" or "tensor", got {self.group!r}')
        if self.zero not in ("integer", "minimum"):
            raise UsageError(f'zero is "integer" or "minimum", got {self.zero!r}')
        if self.symmetric and self.zero != "integer":
            raise UsageError('zero="minimum" needs symmetric=False: a symmetric grid stores no offset')
        if self.scale not in (*SCALE_DTYPES, "auto"):
            raise UsageError(f"scale is auto, {', '.join(SCALE_DTYPES)}, got {self.scale!r}")

    def resolve(self, scale_dtype: str) -> "Int":
        if self.scale != "auto":
            return self
        return Int(
            bits=self.bits, group=self.group, symmetric=self.symmetric, zero=self.zero, scale=scale_dtype
        )

    @property
    def rows_are_independent(self) -> bool:
        return self.group != "tensor"

    @property
    def lopsided(self) -> bool:
        return self.symmetric

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

    def group_of(self, columns: int) -> int:
        return min(self.group, columns) if isinstance(self.group, int) else columns

    def fit(self, weight: Tensor, shrink: float = 1.0) -> Params:
        grouped = self._grouped(weight)
        if self.group == "tensor":
            grouped = grouped if weight.numel() else weight.new_zeros(1)
            low, high = grouped.amin().view(1, 1), grouped.amax().view(1, 1)
        else:
            low, high = grouped.amin(-1), grouped.amax(-1)
        if self.symmetric:
            return self._fit_symmetric(low, high, shrink)
        return (
            self._fit_zero(low, high, shrink)
            if self.zero == "integer"
            else self._fit_minimum(low, high, shrink)
        )

    def _fit_symmetric(self, low: Tensor, high: Tensor, shrink: float) -> Params:
        extreme = torch.where(high >= -low, high, low)
        return {"scale": self._stored(extreme * (shrink / self.lowest))}

    def _fit_zero(self, low: Tensor, high: Tensor, shrink: float) -> Params:
        constant = low == high
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        # A constant group is one step from zero: exact, where range / (2^b - 1) would be rounded.
        scale = self._stored(torch.where(constant, high - low, (high - low) / self.highest))
        zero = (-low / _divisor(scale.float())).round().clamp(0, self.highest)
        return {"scale": scale, "zero": zero.to(torch.uint8)}

    def _fit_minimum(self, low: Tensor, high: Tensor, shrink: float) -> Params:
        middle, half = (high + low) / 2, (high - low) / 2
        minimum = self._stored(torch.where(half == 0, low, middle - half * shrink))
        return {"scale": self._stored(2 * half * shrink / self.highest), "minimum": minimum}

    def refit(self, weight: Tensor, codes: Tensor, params: Params, importance: Tensor | None) -> Params:
        """Least squares: the scale (and minimum) with the smallest weighted error for these codes."""
        h = torch.ones_like(weight) if importance is None else importance.expand_as(weight)
        q = codes.float()
        if "minimum" in params:
            return self._refit_minimum(weight, q, h)
        if "zero" in params:
            q = q - self._spread(params["zero"].float(), weight.shape[1])
        power = self.sum_per_scale(h * q * q)
        scale = self.sum_per_scale(h * q * weight) / _divisor(power)
        return {**params, "scale": self._stored(torch.where(power > 0, scale, params["scale"].float()))}

    def _refit_minimum(self, weight: Tensor, q: Tensor, h: Tensor) -> Params:
        total, s_q, s_w = (self.sum_per_scale(x) for x in (h, h * q, h * weight))
        mean_q, mean_w = s_q / _divisor(total), s_w / _divisor(total)
        centred = q - self._spread(mean_q, weight.shape[1])
        power = self.sum_per_scale(h * centred * centred)
        scale = self._stored(self.sum_per_scale(h * centred * weight) / _divisor(power))
        return {"scale": scale, "minimum": self._stored(mean_w - scale.float() * mean_q)}

    def round(self, weight: Tensor, params: Params) -> Tensor:
        columns = weight.shape[1]
        scale = self._spread(_divisor(params["scale"].float()), columns)
        if "minimum" in params:
            steps = (weight - self._spread(params["minimum"].float(), columns)).div_(scale).round_()
        else:
            steps = (weight / scale).round_()
            if "zero" in params:
                steps += self._spread(params["zero"].float(), columns)
        return steps.clamp_(self.lowest, self.highest).to(torch.int8 if self.symmetric else torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        columns = codes.shape[1]
        steps = codes.float()
        if "zero" in params:
            steps = steps - self._spread(params["zero"].float(), columns)
        weight = steps.mul_(self._spread(params["scale"].float(), columns))
        return (
            weight.add_(self._spread(params["minimum"].float(), columns)) if "minimum" in params else weight
        )

    def sum_per_scale(self, values: Tensor) -> Tensor:
        group = max(1, self.group_of(values.shape[1]))
        padded = pad(values, (0, -values.shape[1] % group))
        sums = padded.view(values.shape[0], padded.shape[1] // group, group).sum(-1)
        return sums.sum().view(1, 1) if self.group == "tensor" else sums

    def bits_per_weight(self, rows: int, columns: int) -> float:
        groups = -(-columns // max(1, self.group_of(columns)))
        scales = 1 if self.group == "tensor" else rows * groups
        per_scale = 8 * SCALE_DTYPES[self._scale_name()].itemsize
        total = 32 * rows * words(columns, self.bits) + per_scale * scales
        if not self.symmetric and self.zero == "minimum":
            total += per_scale * scales
        elif not self.symmetric:
            total += 32 * (1 if self.group == "tensor" else groups * words(rows, self.bits))
        return total / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``packed`` int32 [rows, words] of codes minus the lowest one; ``zero_packed`` runs down rows."""
        shifted = codes.view(torch.uint8) + (-self.lowest & 255) if self.symmetric else codes  # wraps
        stored = {"packed": pack_bits(shifted, self.bits), **params}
        if "zero" in params:
            stored["zero_packed"] = pack_bits(stored.pop("zero").T.contiguous(), self.bits)
        return stored

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        params = {key: value for key, value in stored.items() if key in ("scale", "minimum")}
        if "zero_packed" in stored:
            rows = params["scale"].shape[0]
            params["zero"] = unpack_bits(stored["zero_packed"], self.bits, rows).T.contiguous()
        codes = unpack_bits(stored["packed"], self.bits, columns)
        if self.symmetric:
            codes = codes.sub_(-self.lowest & 255).view(torch.int8)  # wraps
        return codes, params

    def _grouped(self, weight: Tensor) -> Tensor:
        """[rows, groups, group]; a shorter last group repeats its last column, which moves no extreme."""
        group = max(1, self.group_of(weight.shape[1]))
        missing = -weight.shape[1] % group
        if missing:
            weight = torch.cat((weight, weight[:, -1:].expand(-1, missing)), dim=1)
        return weight.view(weight.shape[0], weight.shape[1] // group, group)

    def _spread(self, per_scale: Tensor, columns: int) -> Tensor:
        """Parameters [rows, groups] repeated over the columns of their group, without copying if possible."""
        if per_scale.shape[1] == 1:
            return per_scale
        group = self.group_of(columns)
        wide = (
            per_scale.unsqueeze(-1)
            .expand(-1, -1, group)
            .reshape(per_scale.shape[0], group * per_scale.shape[1])
        )
        return wide[:, :columns]

    def _scale_name(self) -> str:
        return "float32" if self.scale == "auto" else self.scale

    def _stored(self, values: Tensor) -> Tensor:
        dtype = SCALE_DTYPES[self._scale_name()]
        stored = values.to(dtype)
        if bool(torch.isinf(stored).any()):
            raise FormatError(
                f"its range needs a scale of {float(values.abs().max()):.3g}, more than {dtype} holds: "
                "use scale='bfloat16' or 'float32'"
            )
        return stored


def _divisor(values: Tensor) -> Tensor:
    """Replaces zeros by infinity: what is divided by it becomes zero."""
    return torch.where(values == 0, torch.inf, values)
