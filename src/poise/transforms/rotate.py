"""Rotations of the residual stream and of values."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from poise.core.errors import UsageError
from poise.core.topology import Topology
from poise.core.transform import Material, Rewrite, Transform
from poise.transforms._orthogonal import rotation
from poise.transforms.fold import folded


@dataclass(frozen=True, kw_only=True)
class Rotate(Transform):
    """Spreads outliers over all channels. R1 rotates the residual stream: what writes to it, and after its norms were
    folded, what reads it; norms without weights do not see the difference. R2 rotates the channels of every head of
    values, and back in the matrix that reads the heads. Offline: the model has as many operations as before. (Ashkboos et
    al. 2024, QuaRot, arXiv 2404.00456; Liu et al. 2024, SpinQuant, arXiv 2405.16406, names R1 and R2.)

    Attributes:
        kind: ``hadamard`` (with random signs) or ``random``.
        stream: whether the residual stream is rotated. A tied model must be untied first.
        values: whether values are.
        seed: of signs, or of the random matrix.
    """

    kind: str = "hadamard"
    stream: bool = True
    values: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "random"):
            raise UsageError(f"kind is hadamard or random, got {self.kind!r}")
        if not self.stream and not self.values:
            raise UsageError("rotate needs stream or values")

    def refuses(self, topology: Topology) -> str | None:
        if self.stream and (reason := cannot_rotate(topology)) is not None:
            return f"the residual stream cannot be rotated: {reason}"
        if self.values and not any(pair.head for pair in topology.pairs):
            return "no matrix of this model makes values that one other reads (fused projections?); values=False leaves them"
        return None

    def rewrites(self, material: Material) -> Sequence[Rewrite]:
        topology, done = material.topology, list[Rewrite]()
        if self.stream:
            done += rotated_stream(material, rotation(self.kind, topology.width, self.seed))
        if self.values:
            heads = [pair for pair in topology.pairs if pair.head]
            for number, pair in enumerate(heads, 1):
                matrix = rotation(self.kind, pair.head or 0, self.seed + number)
                done += rotated(pair.writer, pair.bias, pair.reader, matrix)
        return done


def cannot_rotate(topology: Topology) -> str | None:
    """Why the residual stream cannot be rotated, or None."""
    if topology.mixed is not None:
        return topology.mixed
    if topology.head is None:
        return "the head is the embedding, and only one of them takes the last norm's weight; put untie before it"
    biased = [norm.bias for norm in topology.norms if norm.residual and norm.bias is not None]
    return f"{biased[0]} cannot be folded" if biased else None


def rotated_stream(material: Material, matrix: Tensor) -> list[Rewrite]:
    """Folds all norms of the residual stream and turns what writes and reads it."""
    topology = material.topology
    norms = [norm for norm in topology.norms if norm.residual]
    done = [rewrite for norm in norms for rewrite in folded(norm, material.read)]
    readers = dict.fromkeys(name for norm in norms for name in norm.readers)
    done += [Rewrite(name=name, kind="right", value=matrix) for name in (topology.embedding, *readers)]
    done += [Rewrite(name=name, kind="left", value=matrix) for name in (*topology.writers, *topology.biases)]
    return done


def rotated(writer: str, bias: str | None, reader: str, matrix: Tensor) -> list[Rewrite]:
    """Turns the channels of every head."""
    return [
        *(Rewrite(name=name, kind="left", value=matrix) for name in (writer, bias) if name is not None),
        Rewrite(name=reader, kind="right", value=matrix),
    ]
