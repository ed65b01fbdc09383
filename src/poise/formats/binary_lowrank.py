"""Products of two matrices of signs: one bit a weight and below (LittleBit, Lee et al. 2025, arXiv 2506.13771;
NanoQuant, 2026)."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.core.bits import pack_bits, unpack_bits, words
from poise.core.errors import PoiseWarning, UsageError
from poise.core.format import Format, Params
from poise.formats._lowrank import Factors, descend, factorize, nearest_signs
from poise.formats._scales import DTYPES, Scales

FLOOR = 1e-6
"""Least importance of a column, as a share of the largest: columns of none still get signs."""


@dataclass(frozen=True, kw_only=True)
class BinaryLowrank(Format):
    """W = diag(h) U diag(l) V^T diag(g), U [rows, R] and V [columns, R] of signs; R is the largest that ``bits`` pay for.

    Params: ``row`` [rows, 1], h; shared by all rows ``rank`` [1, R], l, ``column`` [columns, 1], g, and ``right`` uint8
    [columns, R], V as 0 and 1. Codes are uint8 [rows, R], U as 0 and 1.

    ``fit`` starts with ADMM and refines all parts in turn (``_lowrank``). ``round`` looks for the signs of each row
    of U of least sum_j importance_j (w_j - w'_j)^2 with the rest as it is: that problem is as hard as a lattice's
    nearest point, so it finds signs that no single flip improves, not always the nearest.

    Deviations: one path, where LittleBit adds a second for what is left: at equal bits, one with twice the rank has less
    error. No training, of which both papers do much: on Gaussian weights the error at 1 bit is higher than that of plain
    signs; it pays below 1 bit, and where singular values fall off.

    Attributes:
        bits: stored bits a weight at most, 0.05 to 2; matrices too small for it have R = 1.
        scale: dtype of h, l and g, ``float16``, ``bfloat16`` or ``float32``.
    """

    width = 0

    bits: float = 0.8
    scale: str = "float16"

    def __post_init__(self) -> None:
        if not 0.05 <= self.bits <= 2:
            raise UsageError(f"binary-lowrank takes 0.05 to 2 bits, got {self.bits!r}")
        if self.scale not in DTYPES:
            raise UsageError(f"scale is {', '.join(DTYPES)}, got {self.scale!r}")

    @property
    def tile_rows(self) -> int:
        return 0

    @property
    def shared(self) -> frozenset[str]:
        return frozenset({"rank", "column", "right"})

    def group_of(self, columns: int) -> int:
        return max(1, columns)

    def rank_of(self, rows: int, columns: int) -> int:
        """R: the largest whose bits fit."""
        each = 8 * DTYPES[self.scale].itemsize
        room = self.bits * rows * columns - each * (rows + columns) - 2 * 31  # two padded words
        return max(1, int(room // (rows + columns + each))) if rows and columns else 1

    def columns_of(self, codes: Tensor, params: Params) -> int:
        return params["right"].shape[0]

    def cover(self, weight: Tensor) -> Params:
        return self.fit(weight)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        rows, columns = weight.shape
        rank = self.rank_of(rows, columns)
        size = weight.abs().amax() if weight.numel() else torch.tensor(0.0)
        if size == 0:
            return self._store(
                torch.zeros(rows, 1), torch.ones(rank), torch.ones(columns, 1), torch.ones(columns, rank)
            )
        x = weight / size
        unit = x.norm() / x.numel() ** 0.5
        root = _weights(importance, columns).sqrt()
        found = factorize(x.div_(unit).mul_(root), rank)
        return self._levelled(found._replace(g=found.g / root.view(-1, 1), h=found.h * unit), size)

    def descend(
        self, weight: Tensor, codes: Tensor, params: Params, hessian: Tensor, rounds: int
    ) -> tuple[Tensor, Params]:
        """Every part in turn at its best for the rest, signs by flips; as factors are stored, no round that raises the
        objective is kept."""
        size = weight.abs().amax() if weight.numel() else torch.tensor(0.0)
        least = _objective(weight - self.decode(codes, params), hessian)
        for _ in range(rounds if size else 0):
            h, l, g = (params[key].float() for key in ("row", "rank", "column"))  # noqa: E741
            found = Factors(_signs(codes), _signs(params["right"]), h / size, l[0], g)
            try:
                found = descend(weight / size, found, hessian)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                message = (
                    "magnitudes have no least squares in float32, so descent under the Hessian ended early"
                )
                warnings.warn(
                    f"binary-lowrank: {message}; a larger damp may help", PoiseWarning, stacklevel=2
                )
                break
            new, trial = (found.u > 0).to(torch.uint8), self._levelled(found, size)
            now = _objective(weight - self.decode(new, trial), hessian)
            if not now < least:
                break
            codes, params, least = new, trial, now
        return codes, params

    def _levelled(self, factors: Factors, size: Tensor) -> Params:
        """As they are stored: l and g have a mean square of one, and h holds the magnitude."""
        of_l, of_g = (part.square().mean().sqrt().clamp(min=1e-30) for part in (factors.l, factors.g))
        return self._store(factors.h * (of_l * of_g) * size, factors.l / of_l, factors.g / of_g, factors.v)

    def _store(self, h: Tensor, l: Tensor, g: Tensor, v: Tensor) -> Params:  # noqa: E741
        scales = Scales(self.scale)
        parts = {"row": h, "rank": l.view(1, -1), "column": g}
        stored = {key: scales.store(value)["scale"] for key, value in parts.items()}
        return {**stored, "right": (v > 0).to(torch.uint8)}

    def at(self, params: Params, columns: slice) -> Params:
        return {**params, "column": params["column"][columns], "right": params["right"][columns]}

    def round(
        self, weight: Tensor, params: Params, importance: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        self.refuse_noise(noise)
        if not weight.numel():
            return torch.zeros(weight.shape[0], params["rank"].shape[1], dtype=torch.uint8)
        root = _weights(importance, weight.shape[1]).sqrt()
        h = params["row"].float()
        # Rows in units of their h: nothing is too small or too large, and signs depend on the ratio alone.
        x = weight / torch.where(h == 0, torch.inf, h) * root
        other = self._right(params) * root.view(-1, 1)
        return (nearest_signs(x, torch.ones_like(h), other) > 0).to(torch.uint8)

    def _right(self, params: Params) -> Tensor:
        """diag(g) V diag(l), [columns, R]."""
        return _signs(params["right"]).mul_(params["column"].float()).mul_(params["rank"].float())

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return (_signs(codes) @ self._right(params).t()).mul_(params["row"].float())

    def bits_per_weight(self, rows: int, columns: int) -> float:
        rank = self.rank_of(rows, columns)
        signs = 32 * (words(rows * rank, 1) + words(columns * rank, 1))
        scales = 8 * DTYPES[self.scale].itemsize * (rows + columns + rank)
        return (signs + scales) / max(1, rows * columns)

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """``packed`` and ``right`` int32 [1, words], U and V row by row without padding; ``row``, ``rank``, ``column``."""
        right = pack_bits(params["right"].reshape(1, -1), 1)
        return {**params, "right": right, "packed": pack_bits(codes.reshape(1, -1), 1)}

    def unpack(self, stored: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        rows, rank = stored["row"].shape[0], stored["rank"].shape[1]
        codes = unpack_bits(stored["packed"], 1, rows * rank).view(rows, rank)
        right = unpack_bits(stored["right"], 1, columns * rank).view(columns, rank)
        scales = {key: stored[key] for key in ("row", "rank", "column")}
        return codes, {**scales, "right": right}


def _weights(importance: Tensor | None, columns: int) -> Tensor:
    """Importance [columns] in units of the largest, never zero."""
    if importance is None or not bool(importance.any()):
        return torch.ones(columns)
    return (importance.float() / importance.max()).clamp(min=FLOOR)


def _objective(lost: Tensor, hessian: Tensor) -> float:
    """tr E H E^T."""
    return float(((lost @ hessian) * lost).sum(dtype=torch.float64))


def _signs(bit: Tensor) -> Tensor:
    """-1 and 1 for 0 and 1."""
    return bit.float().mul_(2).sub_(1)
