"""What is known of the activation that a group of linears reads."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of a layer's inputs x; means over tokens, float32.

    Attributes:
        second_moment: E[x_j^2], [columns].
        n_tokens: tokens behind it.
        data_hash: hash of the token ids, so that evaluation text can be told apart.
        hessian: E[x x^T], [columns, columns], of the inputs that the quantized layer will read; or [k, columns,
            columns], one for each of k equal runs of rows, when every token is weighed by what the run's outputs
            matter.
        mean: E[x_j], [columns].
        largest: largest |x_j|, [columns].
        cross: E[x' x^T], [columns, columns], x' the inputs in the original model where x comes from layers that are
            quantized already.
        drift: E[(r' - r) x^T], [rows, columns], of a matrix whose output is added to the residual stream: r what the
            stream holds before that, r' what it holds in the original model.
        notes: what is doubtful about them, for people.
    """

    second_moment: Tensor
    n_tokens: int
    data_hash: str
    hessian: Tensor | None = None
    cross: Tensor | None = None
    drift: Tensor | None = None
    mean: Tensor | None = None
    largest: Tensor | None = None
    notes: tuple[str, ...] = ()
    _derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.second_moment.dim() != 1:
            raise ValueError(f"second_moment must be [columns], got {list(self.second_moment.shape)}")
        if not bool(torch.isfinite(self.second_moment).all()) or bool((self.second_moment < 0).any()):
            raise ValueError("second_moment must be finite and not negative")
        n = len(self.second_moment)
        for name in ("hessian", "cross"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape[-2:]) != (n, n):
                raise ValueError(f"{name} must be [{n}, {n}], got {list(value.shape)}")
        if self.drift is not None and (self.drift.dim() != 2 or self.drift.shape[1] != n):
            raise ValueError(f"drift must be [rows, {n}], got {list(self.drift.shape)}")

    def derive(self, key: Any, make: Callable[[], Any]) -> Any:
        """What follows from these statistics alone, made once: linears that read the same input share it."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    @property
    def known(self) -> frozenset[str]:
        """Names of the statistics that are there."""
        matrices = {item.name for item in fields(self) if isinstance(getattr(self, item.name, None), Tensor)}
        return frozenset(matrices)

    def of_run(self, run: int) -> "Stats":
        """With the matrices of one run of rows alone."""
        if self.hessian is None or self.hessian.dim() == 2:
            return self
        cross = self.cross if self.cross is None or self.cross.dim() == 2 else self.cross[run]
        return replace(self, hessian=self.hessian[run], cross=cross)

    @property
    def runs(self) -> int:
        """Runs of rows that have a Hessian of their own."""
        return 1 if self.hessian is None or self.hessian.dim() == 2 else len(self.hessian)
