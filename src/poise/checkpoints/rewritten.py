"""A checkpoint seen through rewritten weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from poise.checkpoints.linears import Skeleton, linears_of
from poise.core.checkpoint import Checkpoint, TensorInfo
from poise.core.linear import Linear
from poise.core.transform import Rewrite

ORDER = "order"
"""Name of what lists rewrites in a file."""


class Rewritten(Checkpoint):
    """Another checkpoint, its tensors rewritten as they are read.

    Args:
        inner: the checkpoint behind it.
        rewrites: what is done, in this order.
        untied: give the head a tensor of its own, a copy of the embedding.
        precision: of the arithmetic, and of what is read.
    """

    def __init__(
        self,
        inner: Checkpoint,
        rewrites: Sequence[Rewrite],
        *,
        untied: bool = False,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.inner, self.rewrites, self.precision = inner, tuple(rewrites), precision
        self.source, self.path, self.config, self.dtype = inner.source, inner.path, inner.config, inner.dtype
        self.of: dict[str, list[Rewrite]] = {}
        for rewrite in self.rewrites:
            self.of.setdefault(rewrite.name, []).append(rewrite)
        self.copied: dict[str, str] = {}
        self.own = inner.linears()
        if untied:
            skeleton = Skeleton(inner.config)
            table = next(linear.name for linear in self.own if linear.tied)
            self.copied = {str(skeleton.head): table}
            self.config = _untied(inner.config)
            self.own = linears_of(
                Skeleton(self.config), {name: info.shape for name, info in self.tensors().items()}
            )
        self.matrices = {linear.name: linear for linear in self.own}
        self.last: tuple[str, Tensor] | None = None

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.inner.kind

    def tensors(self) -> dict[str, TensorInfo]:
        known = self.inner.tensors()
        return known | {name: known[source] for name, source in self.copied.items()}

    def read(self, name: str) -> Tensor:
        value = self.inner.read(self.copied.get(name, name))
        if name not in self.of:
            return value
        linear = self.matrices.get(name)
        shape = value.shape
        if linear is None:
            return self._through(name, value.reshape(len(value), -1)).view(shape)
        turned = value.transpose(-1, -2) if linear.transposed else value
        done = self._through(name, turned.reshape(linear.rows, linear.columns))
        return (
            done.view(turned.shape).transpose(-1, -2) if linear.transposed else done.view(shape)
        ).contiguous()

    def _through(self, name: str, matrix: Tensor) -> Tensor:
        matrix = matrix.to(self.precision)
        for rewrite in self.of[name]:
            matrix = rewrite.apply(matrix)
        return matrix

    def read_rows(self, linear: Linear, rows: slice) -> Tensor:
        """Rewritten matrices are read whole, and the last one is kept for the next rows."""
        if linear.name not in self.of:
            return self.inner.read_rows(self.inner_linear(linear), rows)
        if self.last is None or self.last[0] != linear.name:
            self.last = (linear.name, self.read_matrix(linear))
        return self.last[1][rows]

    def inner_linear(self, linear: Linear) -> Linear:
        source = self.copied.get(linear.name)
        return (
            linear if source is None else next(item for item in self.inner.linears() if item.name == source)
        )

    def linears(self) -> list[Linear]:
        return self.own

    def fingerprint(self) -> str:
        """Of the checkpoint behind it and of all rewrites."""
        found = hashlib.sha256(self.inner.fingerprint().encode())
        for rewrite in self.rewrites:
            found.update(f"{rewrite.name} {rewrite.kind}".encode())
            found.update(rewrite.value.contiguous().numpy().tobytes())
        found.update(repr(self.copied).encode())
        return found.hexdigest()

    def tokenizer(self) -> Any:
        return self.inner.tokenizer()

    def sidecars(self) -> dict[str, bytes]:
        return self.inner.sidecars()

    def activations(self) -> dict[str, int]:
        return self.inner.activations()


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with a head of its own, wherever it says otherwise."""
    return {
        key: _untied(value) if isinstance(value, dict) and "tie_word_embeddings" in value else value
        for key, value in config.items()
    } | {"tie_word_embeddings": False}


def as_tensors(rewrites: Sequence[Rewrite]) -> dict[str, Tensor]:
    """Rewrites as tensors for a file; a value that several of them share is there once."""
    values: dict[int, Tensor] = {}
    places: dict[int, int] = {}
    for rewrite in rewrites:
        key = id(rewrite.value)
        places[key] = places.get(key, len(places))
        values[places[key]] = rewrite.value
    order = [(rewrite.name, rewrite.kind, places[id(rewrite.value)]) for rewrite in rewrites]
    listed = torch.tensor(list(json.dumps(order).encode()), dtype=torch.uint8)
    return {ORDER: listed} | {str(place): value for place, value in values.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Rewrite]:
    """Inverse of ``as_tensors``."""
    order = json.loads(bytes(tensors[ORDER].tolist()))
    return [Rewrite(name=name, kind=kind, value=tensors[str(place)]) for name, kind, place in order]
