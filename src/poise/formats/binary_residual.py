"""Signs, and a second plane of signs for the columns that need it (BiLLM, Huang et al. 2024, arXiv 2402.04291;
ARB-LLM, Li et al. 2024, arXiv 2410.03129)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from poise.core.bits import pack_bits, unpack_bits, words
from poise.core.errors import UsageError
from poise.core.format import Format, Params
from poise.core.slabs import map_slabs
from poise.formats._scales import DTYPES, Scales

ROUNDS = 12
"""Of alternating refinement; ARB-LLM takes 15. The error of the last is within a thousandth of the limit."""


@dataclass(frozen=True, kw_only=True)
class BinaryResidual(Format):
    """w_ij = c_j (a_ig B_ij + [j is salient] b_ig R_ij), B and R of signs, g the group of column j.

    Params: ``scale`` and ``residual`` [rows, groups], a >= b >= 0; ``column`` [1, columns], c; ``salient`` bool
    [1, columns], the same for all rows. Codes are uint8 [rows, columns]: 0 to 3 for -a - b, -a + b, a - b, a + b, where
    columns that are not salient (b = 0) have 0 and 3 only.

    Salient are the columns whose error under a single plane weighs most: sum_i importance_j (w_ij - w'_ij)^2. Scales
    are refined in turn with the signs, each the least-squares solution for the rest (ARB-RC, equations 12 to 14 of
    ARB-LLM, here also for the second plane and weighed by importance).

    Deviations: one share of salient columns for the matrix instead of a search for every 128 columns; no split of the
    other weights by magnitude, since its bitmap is one more bit a weight, which published bit counts leave out.

    Attributes:
        group: columns that share scales, at least 16, or ``"channel"``, a row.
        share: of the columns that are salient, 0 to 1.
        scale: dtype of all scales, ``float16``, ``bfloat16`` or ``float32``.
    """

    bits = 1

    group: int | str = 128
    share: float = 0.1
    scale: str = "float16"

    def __post_init__(self) -> None:
        if self.group != "channel" and not (type(self.group) is int and self.group >= 16):
            raise UsageError(f'group is at least 16, or "channel", got {self.group!r}')
        if not 0 <= self.share <= 1:
            raise UsageError(f"share is 0 to 1, got {self.share!r}")
        if self.scale not in DTYPES:
            raise UsageError(f"scale is {', '.join(DTYPES)}, got {self.scale!r}")

    @property
    def tile_rows(self) -> int:
        return 0

    @property
    def shared(self) -> frozenset[str]:
        return frozenset({"column", "salient"})

    def group_of(self, columns: int) -> int:
        return max(1, columns if self.group == "channel" else min(int(self.group), columns))

    def salient_of(self, columns: int) -> int:
        """Columns with a second plane."""
        return round(self.share * columns)

    def cover(self, weight: Tensor) -> Params:
        return self.fit(weight)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        rows, columns = weight.shape
        groups = -(-columns // self.group_of(columns))
        if not weight.numel():
            nothing = self._store(
                torch.zeros(rows, groups), torch.zeros(rows, groups), torch.ones(1, columns)
            )
            return {**nothing, "salient": torch.arange(columns).view(1, -1) < self.salient_of(columns)}
        size = weight.abs().amax()
        x = weight / torch.where(size == 0, 1, size)
        w = self._weights(importance, columns)
        plain = torch.zeros(1, columns, dtype=torch.bool)
        single = self._refine(x, w, plain)

        def errors(rows: slice) -> Tensor:
            part = _Scales(single.scale[rows], single.residual[rows], single.column)
            codes = self._nearest(x[rows], part, plain)
            return self._levels(codes, part, plain).sub_(x[rows]).square_().sum(0)

        error = torch.stack(map_slabs(errors, rows, columns)).sum(0) * w[0]
        salient = plain.clone()
        salient[0, error.argsort(descending=True, stable=True)[: self.salient_of(columns)]] = True
        a, b, c = self._refine(x, w, salient, single) if self.share else single
        return {**self._store(a * size, b * size, c), "salient": salient}

    def _store(self, a: Tensor, b: Tensor, c: Tensor) -> dict[str, Tensor]:
        scales = Scales(self.scale)
        stored = zip(("scale", "residual", "column"), (a, b, c), strict=True)
        return {key: scales.store(value)["scale"] for key, value in stored}

    def _weights(self, importance: Tensor | None, columns: int) -> Tensor:
        """Importance [1, columns], equal in groups that have none; the largest is one."""
        if importance is None or not bool(importance.any()):
            return torch.ones(1, columns)
        w = (importance.float() / importance.max()).view(1, -1)
        return torch.where(self._spread(self._sums(w), columns) > 0, w, 1)

    def _refine(self, x: Tensor, w: Tensor, salient: Tensor, start: "_Scales | None" = None) -> "_Scales":
        """Scales of least squared error: of groups, then of columns, then the signs, over and over."""
        rows, columns = x.shape
        c = torch.ones(1, columns) if start is None else start.column
        a = torch.empty(rows, -(-columns // self.group_of(columns)))
        b = torch.empty_like(a)
        second = salient.float()
        mass, second_mass = self._sums(w), self._sums(w * second)

        def begin(slab: slice) -> None:
            size = x[slab].abs().mul_(w)
            a[slab] = self._sums(size) / mass
            half = self._sums(size.mul_(second)) / (2 * second_mass.clamp(min=1e-30))
            b[slab] = torch.minimum(a[slab], half)

        def sweep(slab: slice) -> Tensor:
            found = self._fit_groups(x[slab], w, _Scales(a[slab], b[slab], c), salient)
            a[slab], b[slab] = found.scale, found.residual
            return self._column_sums(x[slab], found, salient)

        map_slabs(begin, rows, columns)
        for _ in range(ROUNDS):
            c = _columns(torch.stack(map_slabs(sweep, rows, columns)).sum(0))
        map_slabs(sweep, rows, columns)
        return _Scales(a, b, c)

    def _fit_groups(self, x: Tensor, w: Tensor, scales: "_Scales", salient: Tensor) -> "_Scales":
        """a and b of the normal equations of x = c (a B + b R), for the signs that these scales give."""
        codes = self._nearest(x, scales, salient)
        first = _signs(codes >> 1)
        second = _signs(codes & 1).mul_(salient)
        wc, wcc = w * scales.column, w * scales.column.square()
        aa, bb, ab = self._sums(wcc), self._sums(wcc * salient), self._sums(first * second * wcc)
        xa, xb = self._sums(first.mul_(x).mul_(wc)), self._sums(second.mul_(x).mul_(wc))
        det = aa * bb - ab.square()
        solvable = det > 1e-6 * aa * bb
        det = torch.where(solvable, det, 1)
        a = torch.where(solvable, (xa * bb - xb * ab) / det, xa / torch.where(aa > 0, aa, 1))
        b = torch.where(solvable, (xb * aa - xa * ab) / det, 0)
        a, b = a.abs(), b.abs()
        return _Scales(torch.maximum(a, b), torch.minimum(a, b), scales.column)

    def _column_sums(self, x: Tensor, scales: "_Scales", salient: Tensor) -> Tensor:
        """sum_i x v and sum_i v^2 of every column, v = a B + b R; [2, columns]."""
        v = self._levels(self._nearest(x, scales, salient), scales._replace(column=torch.ones(1)), salient)
        return torch.stack(((x * v).sum(0), v.square().sum(0)))

    def _nearest(self, x: Tensor, scales: "_Scales", salient: Tensor) -> Tensor:
        """Codes: B is the sign, R is positive where the weight is above what B alone gives."""
        columns = x.shape[1]
        middle = self._spread(scales.scale, columns) * scales.column
        outside = x.abs() > middle
        up = x > 0
        codes = up.to(torch.uint8) << 1
        return codes | torch.where(salient, up == outside, up)

    def _levels(self, codes: Tensor, scales: "_Scales", salient: Tensor) -> Tensor:
        columns = codes.shape[1]
        value = _signs(codes >> 1).mul_(self._spread(scales.scale, columns))
        value += _signs(codes & 1).mul_(self._spread(scales.residual, columns)).mul_(salient)
        return value.mul_(scales.column)

    def _sums(self, values: Tensor) -> Tensor:
        """Sums of the groups, [rows, groups]."""
        n = self.group_of(values.shape[1])
        return pad(values, (0, -values.shape[1] % n)).view(values.shape[0], -1, n).sum(-1)

    def _spread(self, values: Tensor, columns: int) -> Tensor:
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self.group_of(columns), dim=1)[:, :columns]

    def at(self, params: Params, columns: slice) -> Params:
        groups = slice(0, 1)
        if params["scale"].shape[1] > 1:
            n = self.group_of(columns.stop)
            groups = slice(columns.start // n, -(-columns.stop // n))
        parts = {"scale": groups, "residual": groups, "column": columns, "salient": columns}
        return {key: params[key][:, part] for key, part in parts.items()}

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        scales, salient = _load(params), params["salient"]
        nearest = self._nearest(weight, scales, salient)
        if noise is None or not weight.numel():
            return nearest
        value = self._levels(nearest, scales, salient)
        step = torch.where(salient, 1, 3) * torch.sign(weight - value)
        other = (nearest.to(torch.int16) + step.to(torch.int16)).clamp(0, 3).to(torch.uint8)
        gap = self._levels(other, scales, salient) - value
        share = torch.where(gap == 0, 0.0, (weight - value) / gap)
        return torch.where(noise < share, other, nearest)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self._levels(codes, _load(params), params["salient"])

    def bits_per_weight(self, rows: int, columns: int) -> float:
        planes = words(columns, 1) + words(self.salient_of(columns), 1)
        groups = -(-columns // self.group_of(columns))
        each = 8 * DTYPES[self.scale].itemsize
        total = rows * (32 * planes + 2 * each * groups) + each * columns + 32 * words(columns, 1)
        return total / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``packed`` and ``second`` int32 [rows, words], the two planes; ``salient`` packed likewise; the scales."""
        salient = params["salient"]
        return {
            **params,
            "salient": pack_bits(salient.to(torch.uint8), 1),
            "packed": pack_bits(codes >> 1, 1),
            "second": pack_bits((codes & 1)[:, salient[0]], 1),
        }

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        salient = unpack_bits(stored["salient"], 1, columns).bool()
        first = unpack_bits(stored["packed"], 1, columns)
        codes = 3 * first
        second = unpack_bits(stored["second"], 1, int(salient.sum()))
        codes[:, salient[0]] = 2 * first[:, salient[0]] + second
        scales = {key: stored[key] for key in ("scale", "residual", "column")}
        return codes, {**scales, "salient": salient}


class _Scales(NamedTuple):
    """a and b [rows, groups], c [1, columns]; float32."""

    scale: Tensor
    residual: Tensor
    column: Tensor


def _columns(sums: Tensor) -> Tensor:
    """c = sum_i x v / sum_i v^2 [1, columns], of a mean square of one."""
    product, power = sums.unsqueeze(1)
    c = torch.where(power > 0, product / torch.where(power > 0, power, 1), 1).abs()
    unit = c.square().mean().sqrt()
    return torch.where(unit > 0, c / torch.where(unit > 0, unit, 1), 1)


def _load(params: Params) -> _Scales:
    return _Scales(params["scale"].float(), params["residual"].float(), params["column"].float())


def _signs(bit: Tensor) -> Tensor:
    """-1 and 1 for 0 and 1."""
    return bit.float().mul_(2).sub_(1)
