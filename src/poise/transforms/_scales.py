"""Factors of channels: what divides by them before a matrix multiplies the matrix's columns."""

import torch
from torch import Tensor

from poise.core.topology import Norm, Pair
from poise.core.transform import Read, Rewrite


def scaled_norm(norm: Norm, factor: Tensor, read: Read) -> list[Rewrite]:
    """Divides a norm's outputs by factors [channels] and multiplies the columns of its readers."""
    shift = 1 - norm.unit
    weight = (read(norm.weight).double().flatten() + shift) / factor - shift
    done = [Rewrite(name=name, kind="columns", value=factor) for name in norm.readers]
    done.append(Rewrite(name=norm.weight, kind="set", value=weight))
    if norm.bias is not None:
        done.append(Rewrite(name=norm.bias, kind="rows", value=1 / factor))
    return done


def scaled_pair(pair: Pair, factor: Tensor) -> list[Rewrite]:
    """Divides a writer's outputs by factors [channels] and multiplies the columns of the reader."""
    outputs = [name for name in (pair.writer, pair.bias) if name is not None]
    done = [Rewrite(name=name, kind="rows", value=1 / factor) for name in outputs]
    return [*done, Rewrite(name=pair.reader, kind="columns", value=read_by(pair, factor))]


def read_by(pair: Pair, channels: Tensor) -> Tensor:
    """What a writer's channels are for the reader: heads of values are read several times."""
    if pair.head is None:
        return channels
    return channels.view(-1, pair.head).repeat_interleave(pair.repeats, 0).flatten()


def written_by(pair: Pair, columns: Tensor) -> Tensor:
    """Means over the columns of a reader that one channel of the writer is."""
    if pair.head is None:
        return columns
    return columns.view(-1, pair.repeats, pair.head).mean(1).flatten()


def balanced(factor: Tensor) -> Tensor:
    """Factors around one, float64: over the geometric mean of the largest and the smallest (as AWQ's reference does)."""
    factor = factor.double().clamp(min=torch.finfo(torch.float32).tiny)
    return factor / (factor.max() * factor.min()).sqrt()
