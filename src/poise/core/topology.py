"""How matrices of a model hang together: what a rewriting of weights has to know to leave the function as it is."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm and who reads it.

    Attributes:
        weight: name of its tensor.
        bias: name of its tensor, or None.
        unit: the weight that multiplies by one: 1, or 0 where the module multiplies by one plus its weight.
        centered: whether it subtracts the mean.
        residual: whether it reads the residual stream.
        readers: names of the matrices that read it.
        only: whether nothing else reads it; a head that is the embedding counts as something else.
        block: index of the decoder block of its readers, None for the last norm.
    """

    weight: str
    bias: str | None
    unit: float
    centered: bool
    residual: bool
    readers: tuple[str, ...]
    only: bool
    block: int | None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A matrix whose outputs are linearly what another reads, channel by channel.

    Attributes:
        writer, reader: names; ``bias`` of the writer, or None.
        head: channels of a head where the writer makes values and the reader reads what attention made of them; channels
            of one head then mix with no others. None where outputs are multiplied one by one by something else.
        repeats: times that a head of values is read; head h of the reader reads head h // repeats.
        block: index of the decoder block.
    """

    writer: str
    reader: str
    bias: str | None
    head: int | None
    repeats: int
    block: int | None


@dataclass(frozen=True, kw_only=True)
class Topology:
    """What is known of a model.

    Attributes:
        norms, pairs: in the order in which the model reaches them.
        embedding: name of its tensor.
        head: name of the tensor that makes logits; None if it is the embedding.
        writers: names of the matrices that add to the residual stream, and of their biases.
        width: of the residual stream.
        bias_of: name of a matrix -> name of the bias that is added to its outputs.
        mixed: why the residual stream cannot be rotated, or None.
    """

    norms: tuple[Norm, ...]
    pairs: tuple[Pair, ...]
    embedding: str
    head: str | None
    writers: tuple[str, ...]
    biases: tuple[str, ...]
    width: int
    bias_of: Mapping[str, str]
    mixed: str | None
