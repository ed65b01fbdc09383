"""Super-blocks of 256 weights: whole-number scales of small groups under float16 scales of all.

    affine      w = d sc q - dmin m      q2_k, q4_k, q5_k
    symmetric   w = d sc v               q3_k, q6_k, iq4_xs;  v a level of a grid, sc with a sign

The search goes down in three steps. Real scales (and minima) of every group by weighted least squares from several
ranges; then d, dmin and the nearest whole numbers; then, alternately, each group's whole numbers against their
neighbours with the exact error of what will be stored, and d, dmin by least squares for the codes that result. Of all
rounds the best of each super-block is kept, so that no round makes an error larger.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from poise.core.format import Params
from poise.formats._block import Block, spread, to_half
from poise.formats._chance import by_chance
from poise.formats._scaled_block import FULL, STEP, make_grid, round_steps, weights_of
from poise.formats._search import (
    ONE,
    TINY,
    ZERO,
    Floats,
    best_scales,
    extremes,
    nearest_codes,
    nearest_levels,
)
from poise.kernels import fast, inlined

SUPER = 256
STARTS = np.array([-0.5, 0.0, 0.35, 0.7, 1.1, 1.6], dtype=np.float32)
"""Both ends of a group's range are tried this many steps further in. With 0, decoded weights are encoded to themselves."""
POLISH = 3
"""Rounds of (nearest codes, regression) after the best start and its first regression."""
HUGE = np.float32(3.0e38)
REACHES = (2, 1, 1)
"""How far a whole-number scale moves in each round; a fourth changes the error by less than a thousandth."""
AFFINE_REACHES = ((5, 2), (3, 2), (2, 2))
"""Likewise, and how far the minimum moves from the one that keeps the middle of the codes in place."""


class SuperBlock(Block):
    """What both kinds share. Codes uint8 [rows, columns]."""

    columns = SUPER
    whole: ClassVar[torch.dtype]

    @property
    def linear(self) -> tuple[str, ...]:
        return tuple(key for key, per in self.per.items() if per == SUPER)

    def empty(self, weight: Tensor) -> Params:
        """Parameters of a weight without elements."""
        rows, columns = weight.shape
        return {
            key: torch.zeros(rows, columns // per, dtype=torch.float16 if per == SUPER else self.whole)
            for key, per in self.per.items()
        }

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of every group, [rows, super-blocks, groups of one]."""
        shape = (weight.shape[0], weight.shape[1] // SUPER, SUPER // self.group)
        low, high = extremes(weight.contiguous().numpy(), self.group)
        return torch.from_numpy(low).view(shape), torch.from_numpy(high).view(shape)


class AffineSuperBlock(SuperBlock):
    """Params: ``d`` and ``dmin`` float16 [rows, super-blocks], ``scale`` and ``minimum`` uint8 [rows, groups].

    Attributes:
        top: the largest code.
        most: the largest whole-number scale and minimum.
    """

    top: ClassVar[int]
    most: ClassVar[int]
    whole = torch.uint8

    @property
    def alphabet(self) -> Tensor:
        return torch.arange(self.top + 1, dtype=torch.uint8)

    def cover(self, weight: Tensor) -> Params:
        low, high = self.extremes(weight)
        real = {"scale": (high - low.clamp(max=0)) / self.top, "minimum": -low.clamp(max=0)}
        params = {}
        for unit, (key, values) in zip(("d", "dmin"), real.items(), strict=True):
            params[unit] = best_unit(values, 0, self.most)
            params[key] = nearest_whole(values, params[unit], 0, self.most).to(self.whole).flatten(1)
        return params

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        if not weight.numel():
            return self.empty(weight)
        x, w = weights_of(weight, importance, SUPER)
        shape = (weight.shape[0], -1, SUPER // self.group)
        top = np.float32(self.top)
        real = affine_groups(x, w, self.group, top)
        scale, minimum = (torch.from_numpy(part).view(shape) for part in real)
        d, dmin = (best_unit(part, 0, self.most) for part in (scale, minimum))
        sc, mn = (
            nearest_whole(part, unit, 0, self.most).to(torch.int32).flatten(1)
            for part, unit in ((scale, d), (minimum, dmin))
        )
        best: Best | None = None
        for reach, width in AFFINE_REACHES:
            units = d.float().numpy(), dmin.float().numpy()
            whole = (sc.numpy(), mn.numpy(), self.most, reach, width)
            sums = affine_neighbours(x, w, self.group, top, *units, *whole)
            error, uu, uv, vv, xu, xv = torch.from_numpy(sums).unbind(-1)
            best = keep_better(best, error, {"d": d, "dmin": dmin, "scale": sc, "minimum": mn})
            determinant = uu * vv - uv * uv
            solvable = determinant > 1e-6 * uu * vv
            alone = torch.where(uu > 0, xu / uu, 0.0)
            d = to_half(torch.where(solvable, (xu * vv - uv * xv) / determinant, alone).clamp(min=0))
            dmin = to_half(
                torch.where(solvable, (uv * xu - uu * xv) / determinant, dmin.float()).clamp(min=0)
            )
        assert best is not None  # there are rounds
        return best.stored(self.whole)

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        scale, minimum = self._scales(params)
        return round_steps(weight, scale, -minimum, self.top, noise)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        scale, minimum = (spread(part, codes.shape[1]) for part in self._scales(params))
        return codes.float().mul_(scale).sub_(minimum)

    def _scales(self, params: Params) -> Iterator[Tensor]:
        """d sc and dmin m, [rows, groups] each."""
        for unit, whole in (("d", "scale"), ("dmin", "minimum")):
            yield spread(params[unit].float(), params[whole].shape[1]) * params[whole]


class SymmetricSuperBlock(SuperBlock):
    """Params: ``d`` float16 [rows, super-blocks], ``scale`` int8 [rows, groups].

    Attributes:
        levels: ascending values of the codes.
        low, high: whole-number scales that can be stored.
    """

    levels: ClassVar[tuple[int, ...]]
    low: ClassVar[int]
    high: ClassVar[int]
    whole = torch.int8

    @property
    def alphabet(self) -> Tensor:
        return torch.arange(len(self.levels), dtype=torch.uint8)

    def cover(self, weight: Tensor) -> Params:
        low, high = self.extremes(weight)
        scale = torch.where(high >= -low, high, low) / max(self.levels, key=abs)
        d = best_unit(scale, self.low, self.high)
        return {"d": d, "scale": nearest_whole(scale, d, self.low, self.high).to(self.whole).flatten(1)}

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        if not weight.numel():
            return self.empty(weight)
        x, w = weights_of(weight, importance, SUPER)
        grid = make_grid(self.levels)
        scales, _ = best_scales(x, w, self.group, grid, SCALES, True, 2)
        scale = torch.from_numpy(scales).view(weight.shape[0], -1, SUPER // self.group)
        d = best_unit(scale, self.low, self.high)
        sc = nearest_whole(scale, d, self.low, self.high).to(torch.int32).flatten(1)
        best: Best | None = None
        for reach in REACHES:
            whole = (sc.numpy(), self.low, self.high, reach)
            sums = symmetric_neighbours(x, w, self.group, grid, d.float().numpy(), *whole)
            error, uu, xu = torch.from_numpy(sums).unbind(-1)
            best = keep_better(best, error, {"d": d, "scale": sc})
            d = to_half(torch.where(uu > 0, xu / uu, d.float()))
        assert best is not None  # there are rounds
        return best.stored(self.whole)

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        scale = self._scales(params)
        if noise is not None:
            return by_chance(make_grid(self.levels).values, weight, spread(scale, weight.shape[1]), noise)
        n = weight.shape[1] // max(1, scale.shape[1])
        codes = np.arange(len(self.levels), dtype=np.uint8)
        arrays = (weight.contiguous().numpy(), scale.contiguous().numpy())
        return torch.from_numpy(nearest_codes(*arrays, max(1, n), make_grid(self.levels), codes))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        values = torch.from_numpy(make_grid(self.levels).values)[codes.int()]
        return values.mul_(spread(self._scales(params), codes.shape[1]))

    def _scales(self, params: Params) -> Tensor:
        """d sc, [rows, groups]."""
        return spread(params["d"].float(), params["scale"].shape[1]) * params["scale"]


SCALES = np.append(np.float32(1), np.linspace(1.1, 0.65, 8, dtype=np.float32))
"""Scales of a symmetric group that are tried, as shares of the one that covers it."""


class Best(NamedTuple):
    """The best parameters so far of every super-block, whole numbers as int32, and their squared errors."""

    error: Tensor
    params: dict[str, Tensor]

    def stored(self, whole: torch.dtype) -> Params:
        """The parameters in the types that are stored."""
        return {
            key: value if value.dtype == torch.float16 else value.to(whole)
            for key, value in self.params.items()
        }


def keep_better(best: Best | None, error: Tensor, params: dict[str, Tensor]) -> Best:
    """Takes over the super-blocks whose error is smaller now."""
    if best is None:
        return Best(error.clone(), {key: value.clone() for key, value in params.items()})
    better = error < best.error
    kept = {
        key: torch.where(spread(better, value.shape[1]), value, best.params[key])
        for key, value in params.items()
    }
    return Best(torch.where(better, error, best.error), kept)


def best_unit(values: Tensor, low: int, high: int) -> Tensor:
    """The float16 unit in which values [rows, super-blocks, groups] are nearest to whole numbers, [rows, super-blocks].

    The value of largest magnitude becomes the number farthest from zero, or one of the next. Values that are multiples
    of a unit are found to be so.
    """
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True)).squeeze(-1)
    extreme = low if low < 0 else high
    best, least = torch.zeros_like(largest, dtype=torch.float16), torch.full_like(largest, torch.inf)
    for number in range(abs(extreme), max(1, abs(extreme) - UNITS), -1):
        exact = largest / (number if extreme > 0 else -number)
        upward = (exact.abs() / STEP).ceil() * STEP  # where float16 is coarse, a smaller unit would not reach
        unit = to_half(torch.where(exact.abs() < FULL, upward.copysign(exact), exact))
        whole = nearest_whole(values, unit, low, high)
        error = whole.mul_(unit.unsqueeze(-1)).sub_(values).square_().sum(-1)
        best, least = torch.where(error < least, unit, best), torch.minimum(error, least)
    return best


UNITS = 16
"""Whole numbers that are tried for the largest scale of a super-block."""


def nearest_whole(values: Tensor, unit: Tensor, low: int, high: int) -> Tensor:
    """values [rows, super-blocks, groups] as multiples of unit [rows, super-blocks], float32."""
    divisor = torch.where(unit == 0, torch.inf, unit.float()).unsqueeze(-1)
    return (values / divisor).round_().clamp_(low, high)


@inlined
def _affine(x: Any, w: Any, s: Any, m: Any, top: Any) -> Any:
    """Of the codes nearest to (x + m) / s: (sum w q, sum w q^2, sum w q x, sum w (x + m - s q)^2)."""
    inverse = ONE / s if s != ZERO else ZERO
    wq, wqq, wqx, error = ZERO, ZERO, ZERO, ZERO
    for i in range(x.shape[0]):
        q = min(max(np.rint((x[i] + m) * inverse), ZERO), top)
        d = x[i] + m - s * q
        error += w[i] * d * d
        wq += w[i] * q
        wqq += w[i] * q * q
        wqx += w[i] * q * x[i]
    return wq, wqq, wqx, error


@inlined
def _regressed(total: Any, wx: Any, wq: Any, wqq: Any, wqx: Any) -> Any:
    """Scale and minimum, not below zero, of least squared error for the codes of these sums; no scale for equal codes."""
    determinant = total * wqq - wq * wq
    s, m = ZERO, ZERO
    if determinant > ZERO:
        s = (total * wqx - wq * wx) / determinant
        m = (wq * wqx - wqq * wx) / determinant
        if m < ZERO:
            s, m = wqx / wqq, ZERO
    return s, m


@inlined
def _affine_error(x: Any, w: Any, s: Any, m: Any, top: Any) -> Any:
    """The last of ``_affine`` alone."""
    inverse = ONE / s if s != ZERO else ZERO
    error = ZERO
    for i in range(x.shape[0]):
        value = x[i] + m
        d = value - s * min(max(np.rint(value * inverse), ZERO), top)
        error += w[i] * d * d
    return error


@fast
def affine_groups(x: Any, importance: Any, n: Any, top: Any) -> tuple[Floats, Floats]:
    """Real scale and minimum (not below zero) of every group of n columns, [rows, groups] each."""
    rows, columns = x.shape
    groups = columns // n
    scales = np.zeros((rows, groups), dtype=np.float32)
    minima = np.zeros((rows, groups), dtype=np.float32)
    for row in range(rows):
        for group in range(groups):
            part, w = x[row, group * n : (group + 1) * n], importance[0, group * n : (group + 1) * n]
            high, low, total, wx = ZERO, ZERO, ZERO, ZERO
            for i in range(n):
                high, low = max(high, part[i]), min(low, part[i])
                total += w[i]
                wx += w[i] * part[i]
            if high - low < TINY:
                continue
            step = (high - low) / top
            least, s_next, m_next = HUGE, ZERO, ZERO
            for bottom in STARTS:
                for peak in STARTS:
                    s, m = step * (top - bottom - peak) / top, max(ZERO, -low - bottom * step)
                    for _ in range(2):
                        wq, wqq, wqx, error = _affine(part, w, s, m, top)
                        s_then, m_then = _regressed(total, wx, wq, wqq, wqx)
                        if error < least:
                            least, scales[row, group], minima[row, group] = error, s, m
                            s_next, m_next = s_then, m_then
                        s, m = s_then, m_then
                        if s <= ZERO:
                            break
            for _ in range(POLISH):
                s, m = s_next, m_next
                if s <= ZERO:
                    break
                wq, wqq, wqx, error = _affine(part, w, s, m, top)
                if error >= least:
                    break
                least, scales[row, group], minima[row, group] = error, s, m
                s_next, m_next = _regressed(total, wx, wq, wqq, wqx)
    return scales, minima


@fast
def affine_neighbours(
    x: Any,
    importance: Any,
    n: Any,
    top: Any,
    d: Any,
    dmin: Any,
    sc: Any,
    mn: Any,
    most: Any,
    reach: Any,
    width: Any,
) -> Floats:
    """Moves whole-number scales and minima to the best of their neighbours, in place.

    A larger scale needs a larger minimum: neighbours lie along the line on which the mean of the codes stays in place.

    Returns:
        [rows, super-blocks, 6]: squared error, and the sums of the normal equations for d and dmin: u u, u v, v v, x u,
        x v with u = sc q and v = m.
    """
    rows, columns = x.shape
    count = columns // SUPER
    each = SUPER // n
    out = np.zeros((rows, count, 6), dtype=np.float32)
    for row in range(rows):
        for block in range(count):
            sums = out[row, block]
            for j in range(each):
                group = block * each + j
                part, w = x[row, group * n : (group + 1) * n], importance[0, group * n : (group + 1) * n]
                total, wx = ZERO, ZERO
                for i in range(n):
                    total += w[i]
                    wx += w[i] * part[i]
                unit, unit_m = d[row, block], dmin[row, block]
                best_s, best_m = sc[row, group], mn[row, group]
                at_s, at_m = best_s, best_m
                wq, _, _, least = _affine(part, w, unit * at_s, unit_m * at_m, top)
                slope = unit * (wq / total) / unit_m if unit_m != ZERO else ZERO
                for i in range(max(0, at_s - reach), min(most, at_s + reach) + 1):
                    middle = at_m + int(np.rint((i - at_s) * slope))
                    for k in range(max(0, middle - width), min(most, middle + width) + 1):
                        error = _affine_error(part, w, unit * i, unit_m * k, top)
                        if error < least:
                            least, best_s, best_m = error, i, k
                sc[row, group], mn[row, group] = best_s, best_m
                wq, wqq, wqx, least = _affine(part, w, unit * best_s, unit_m * best_m, top)
                s, m = np.float32(best_s), np.float32(best_m)
                sums[0] += least
                sums[1] += s * s * wqq
                sums[2] += s * m * wq
                sums[3] += m * m * total
                sums[4] += s * wqx
                sums[5] += m * wx
    return out


@fast
def symmetric_neighbours(
    x: Any, importance: Any, n: Any, grid: Any, d: Any, sc: Any, low: Any, high: Any, reach: Any
) -> Floats:
    """Moves whole-number scales to the best of their neighbours, in place.

    Returns:
        [rows, super-blocks, 3]: squared error, and the sums of the normal equation for d: u u, x u with u = sc v.
    """
    rows, columns = x.shape
    count, each = columns // SUPER, SUPER // n
    out = np.zeros((rows, count, 3), dtype=np.float32)
    t, v = np.empty(SUPER, dtype=np.float32), np.empty(SUPER, dtype=np.float32)
    index = np.empty(SUPER, dtype=np.int32)
    now, least = np.empty(each, dtype=np.float32), np.empty(each, dtype=np.float32)
    best = np.empty(each, dtype=np.int32)
    a_best, b_best = np.empty(each, dtype=np.float32), np.empty(each, dtype=np.float32)
    for row in range(rows):
        for block in range(count):
            part, w = (
                x[row, block * SUPER : (block + 1) * SUPER],
                importance[0, block * SUPER : (block + 1) * SUPER],
            )
            least[:] = HUGE
            for k in range(2 * reach + 1):
                # The present scale first: of equals, it stays.
                move = 0 if k == 0 else ((k + 1) // 2) * (1 if k % 2 else -1)
                for j in range(each):
                    s = min(max(sc[row, block * each + j] + move, low), high)
                    now[j] = d[row, block] * s
                    inverse = ONE / now[j] if now[j] != ZERO else ZERO
                    group, scaled = part[j * n : (j + 1) * n], t[j * n : (j + 1) * n]
                    for i in range(n):
                        scaled[i] = group[i] * inverse
                nearest_levels(t, v, index, SUPER, grid)
                for j in range(each):
                    group, level, weight = (
                        part[j * n : (j + 1) * n],
                        v[j * n : (j + 1) * n],
                        w[j * n : (j + 1) * n],
                    )
                    a, b, error = ZERO, ZERO, ZERO
                    for i in range(n):
                        wv = weight[i] * level[i]
                        a += wv * group[i]
                        b += wv * level[i]
                        e = group[i] - now[j] * level[i]
                        error += weight[i] * e * e
                    if error < least[j]:
                        least[j], a_best[j], b_best[j] = error, a, b
                        best[j] = min(max(sc[row, block * each + j] + move, low), high)
            for j in range(each):
                sc[row, block * each + j] = best[j]
                s = np.float32(best[j])
                out[row, block, 0] += least[j]
                out[row, block, 1] += s * s * b_best[j]
                out[row, block, 2] += s * a_best[j]
    return out


PAIRS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)


def quarters(codes: Tensor) -> Tensor:
    """Two-bit codes [..., 256] as 64 bytes: of each half of 128, byte j has codes j, j + 32, j + 64, j + 96."""
    parts = codes.reshape(*codes.shape[:-1], 2, 4, 32) << PAIRS
    return parts.sum(-2, dtype=torch.uint8).flatten(-2)


def from_quarters(raw: Tensor) -> Tensor:
    """Inverse of ``quarters``."""
    return (raw.reshape(*raw.shape[:-1], 2, 1, 32) >> PAIRS & 3).flatten(-3)


def sixes(scale: Tensor, minimum: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits, [rows, 8 n] each, as [rows, n, 12] bytes (ggml get_scale_min_k4).

    Bytes 0 to 3 and 4 to 7 hold the first four of each; their two high bits are those of the last four, whose low parts
    share bytes 8 to 11.
    """
    sc, mn = (part.view(part.shape[0], -1, 2, 4) for part in (scale, minimum))
    first = [part[..., 0, :] | part[..., 1, :] >> 4 << 6 for part in (sc, mn)]
    return torch.cat((*first, sc[..., 1, :] & 15 | (mn[..., 1, :] & 15) << 4), dim=-1)


def from_sixes(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of ``sixes``."""
    sc, mn, low = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    scale = torch.cat((sc & 63, low & 15 | sc >> 6 << 4), dim=-1)
    minimum = torch.cat((mn & 63, low >> 4 | mn >> 6 << 4), dim=-1)
    return scale.flatten(1), minimum.flatten(1)
