"""A checkpoint with some tensors replaced, as training leaves them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from poise.core.checkpoint import Checkpoint, TensorInfo
from poise.core.linear import Linear


class Replaced(Checkpoint):
    """Another checkpoint, but for a few small tensors that are in memory.

    Args:
        inner: the checkpoint behind it.
        values: name -> new value, in the shape of the old.
    """

    def __init__(self, inner: Checkpoint, values: Mapping[str, Tensor]) -> None:
        self.inner, self.values = inner, dict(values)
        self.source, self.path, self.config, self.dtype = inner.source, inner.path, inner.config, inner.dtype

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.inner.kind

    def tensors(self) -> dict[str, TensorInfo]:
        return self.inner.tensors()

    def read(self, name: str) -> Tensor:
        return self.values[name] if name in self.values else self.inner.read(name)

    def read_rows(self, linear: Linear, rows: slice) -> Tensor:
        return self.inner.read_rows(linear, rows)

    def linears(self) -> list[Linear]:
        return self.inner.linears()

    def fingerprint(self) -> str:
        return self.inner.fingerprint()

    def tokenizer(self) -> Any:
        return self.inner.tokenizer()

    def sidecars(self) -> dict[str, bytes]:
        return self.inner.sidecars()

    def activations(self) -> dict[str, int]:
        return self.inner.activations()
