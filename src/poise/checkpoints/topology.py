"""Who reads whom: found by sending a few tokens without values through an architecture without weights.

Norms, linears and stacks of experts are opaque; what happens between them is followed operation by operation. A tensor is
labelled with where it came from as long as nothing but its shape, or a factor that all channels share, was changed.
Whatever is not understood ends the label, and what it read is then not called exclusive: a transform that needs it refuses.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from poise.checkpoints.linears import Skeleton, is_experts
from poise.core.checkpoint import Checkpoint
from poise.core.linear import Linear
from poise.core.topology import Norm, Pair, Topology

SHAPES = {
    "view", "reshape", "transpose", "permute", "contiguous", "expand", "unsqueeze", "squeeze", "flatten", "unflatten", "to",
    "dropout", "clone", "float", "type", "type_as", "detach", "alias", "__getitem__",
}  # fmt: skip
"""Operations that leave values alone; ``__getitem__`` where it drops none."""
SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
PRODUCTS = {"mul", "__mul__", "__rmul__", "__imul__", "mul_", "multiply"}


@dataclass(frozen=True)
class _Label:
    """Where a tensor comes from.

    Attributes:
        kind: ``stream``, ``norm``, ``writes`` (a sum of outputs of matrices), ``product`` (an output times something),
            ``value`` (an output averaged by attention).
        paths: of the modules.
        head: channels of a head, for ``value``.
    """

    kind: str
    paths: tuple[str, ...] = ()
    head: int = 0


@dataclass
class _Seen:
    """What the trace came to.

    Attributes:
        readers: path of a norm -> modules that read it, in order.
        norm_reads: path of a norm -> kind of what it read.
        spoiled: norms that something else reads too.
        pairs: (writer, reader, channels of a head).
        writers: modules that add to the stream.
        mixed: what reads or writes the stream that is not understood.
    """

    readers: dict[str, list[str]] = field(default_factory=dict)
    norm_reads: dict[str, str] = field(default_factory=dict)
    spoiled: set[str] = field(default_factory=set)
    pairs: list[tuple[str, str, int]] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    mixed: str | None = None


class _Trace(TorchFunctionMode):
    """Follows labels through the operations outside of opaque modules."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.seen = seen
        self.labels: dict[int, _Label] = {}
        self.made_of: dict[int, frozenset[str]] = {}  # matrices whose outputs went into a tensor
        self.alive: list[Tensor] = []  # an id is worth nothing when its tensor is gone
        self.depth = 0

    def label(self, value: Any, label: _Label) -> None:
        if isinstance(value, tuple):
            value = value[0]
        if isinstance(value, Tensor):
            self.labels[id(value)] = label
            self.alive.append(value)
            if label.kind == "writes":
                self.made_of[id(value)] = frozenset(label.paths)

    def of(self, value: Any) -> _Label | None:
        return self.labels.get(id(value)) if isinstance(value, Tensor) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.depth == 0:
            out = result if isinstance(result, Tensor) else None
            parts = isinstance(result, (tuple, list)) and any(isinstance(item, Tensor) for item in result)
            if out is not None or parts:
                self.follow(func.__name__, (*args, *kwargs.values()), out)
        return result

    def follow(self, name: str, args: tuple[Any, ...], out: Tensor | None) -> None:
        """Labels the result of an operation, or notes that what it read is read by something unknown."""
        flat = [item for arg in args for item in (arg if isinstance(arg, tuple | list) else (arg,))]
        tensors = [value for value in flat if isinstance(value, Tensor)]
        known = [(value, label) for value in tensors if (label := self.of(value)) is not None]
        if out is not None:
            self.alive.append(out)
            self.made_of[id(out)] = frozenset().union(*(self.made_of.get(id(value), ()) for value in tensors))
        if not known:
            return
        found = self.result(name, args, tensors, known, out)
        if isinstance(found, _Label) and out is not None:
            self.label(out, found)
        if found:
            return
        for _, old in known:
            if old.kind == "norm":
                self.seen.spoiled.add(old.paths[0])
            if old.kind == "stream":
                self.seen.mixed = (
                    self.seen.mixed or f"{name} reads the residual stream or adds something unknown to it"
                )

    def result(
        self,
        name: str,
        args: tuple[Any, ...],
        tensors: list[Tensor],
        known: list[tuple[Tensor, _Label]],
        out: Tensor | None,
    ) -> _Label | bool:
        """The label of what an operation makes; True if it may have read what it read, False if not."""
        value, label = known[0]
        if out is None:
            return label.kind in ("writes", "product", "value")
        if name in SHAPES and value is args[0] and (name != "__getitem__" or out.numel() >= value.numel()):
            return label
        if name in PRODUCTS:
            if len(tensors) == 1 or any(other.numel() == 1 for other in tensors if other is not value):
                return label
            others = frozenset().union(
                *(self.made_of.get(id(other), ()) for other in tensors if other is not value)
            )
            if label.kind == "writes" and len(label.paths) == 1 and label.paths[0] not in others:
                return _Label("product", label.paths) if out.shape == value.shape else True
        if name in SUMS and len(known) == 2:
            kinds = sorted(item.kind for _, item in known)
            paths = tuple(path for _, item in known if item.kind == "writes" for path in item.paths)
            if kinds == ["writes", "writes"]:
                return _Label("writes", paths)
            if kinds == ["stream", "writes"]:
                self.seen.writers += paths
                return _Label("stream")
        if name == "scaled_dot_product_attention":
            values = self.of(args[2])
            others = frozenset().union(*(self.made_of.get(id(other), ()) for other in args[:2]))
            if (
                values is not None
                and values.kind == "writes"
                and len(values.paths) == 1
                and values.paths[0] not in others
            ):
                return _Label("value", values.paths, args[2].shape[-1])
        return all(item.kind in ("writes", "product", "value") for _, item in known)

    def enter(self, path: str, kind: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.depth += 1
            if self.depth > 1:
                return
            for value in (*args, *kwargs.values()):
                self.read(path, kind, self.of(value))

        return hook

    def read(self, path: str, kind: str, label: _Label | None) -> None:
        if label is None:
            return
        if kind == "norm":
            self.seen.norm_reads[path] = label.kind
        if label.kind == "norm":
            if kind == "matrix":
                self.seen.readers.setdefault(label.paths[0], []).append(path)
            else:
                self.seen.spoiled.add(label.paths[0])
        elif label.kind in ("product", "value") and kind == "matrix":
            self.seen.pairs.append((label.paths[0], path, label.head))
        elif label.kind == "stream" and kind != "norm":
            self.seen.mixed = self.seen.mixed or f"{path} reads the residual stream without a norm"

    def leave(self, path: str, kind: str) -> Any:
        label = {
            "norm": _Label("norm", (path,)),
            "matrix": _Label("writes", (path,)),
            "embedding": _Label("stream"),
        }[kind]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self.depth -= 1
            if self.depth == 0:
                self.label(out, label)

        return hook


def _kind_of(module: nn.Module, table: nn.Module) -> str | None:
    if module is table:
        return "embedding"
    if isinstance(module, nn.Embedding) or (
        next(module.children(), None) is not None and not is_experts(module)
    ):
        return None
    if is_experts(module):
        return "matrix"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    if weight.dim() == 1 and "norm" in type(module).__name__.lower():
        return "norm"
    return "matrix" if weight.dim() == 2 else None


def _trace(skeleton: Skeleton) -> _Seen:
    seen = _Seen()
    trace = _Trace(seen)
    handles = []
    table = skeleton.model.get_input_embeddings()
    for path, module in skeleton.model.named_modules():
        kind = _kind_of(module, table)
        if kind is not None:
            handles.append(module.register_forward_pre_hook(trace.enter(path, kind), with_kwargs=True))
            handles.append(module.register_forward_hook(trace.leave(path, kind), with_kwargs=True))
    try:
        with trace:
            skeleton.run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def _nature(module: nn.Module) -> tuple[float, bool]:
    """The weight that multiplies by one, and whether the mean is subtracted: both are tried out."""
    own = copy.deepcopy(module).to_empty(device="cpu").double()
    for value in own.parameters():
        value.fill_(0)
    weight = own.get_parameter("weight")
    x = torch.linspace(-1, 2, weight.numel(), dtype=torch.float64).unsqueeze(0)
    unit = 1.0 if bool((own(x) == 0).all()) else 0.0
    weight.fill_(unit)
    centered = bool(torch.allclose(own(x + 5), own(x), atol=1e-3))
    return unit, centered


class _Names:
    """Matrices and tensors of a checkpoint by the modules that they belong to."""

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
        self.linears = checkpoint.linears()
        self.table = next(linear for linear in self.linears if linear.role == "embedding")
        self.head = (skeleton.head or "").rpartition(".")[0]
        self.tensors = {skeleton.place(name).parameter: name for name in checkpoint.tensors()}
        self.of: dict[str, list[Linear]] = {}
        for linear in self.linears:
            path = skeleton.place(linear.name).parameter.rpartition(".")[0]
            self.of.setdefault(path, []).append(linear)

    def reading(self, path: str) -> list[Linear]:
        """Matrices that read what their module is given."""
        found = self.of.get(path, [])
        if path == self.head:
            return found or [self.table]
        return [linear for linear in found if linear.role != "expert.down"]

    def writing(self, path: str) -> list[Linear]:
        """Matrices that make what their module gives."""
        found = self.of.get(path, [])
        stacked = any(linear.role.startswith("expert.") for linear in found)
        return [linear for linear in found if linear.role == "expert.down" or not stacked]

    def alone(self, path: str) -> Linear | None:
        """The one matrix of a module."""
        found = self.of.get(path, [])
        return found[0] if len(found) == 1 and found[0].experts is None else None

    def bias(self, path: str) -> str | None:
        return self.tensors.get(f"{path}.bias")


def find_topology(checkpoint: Checkpoint) -> Topology:
    """How the matrices of a checkpoint hang together.

    Raises:
        CheckpointError: unknown architecture.
    """
    skeleton = Skeleton(checkpoint.config)
    names, seen = _Names(checkpoint, skeleton), _trace(skeleton)
    norms = tuple(_norm(names, seen, path, skeleton.model.get_submodule(path)) for path in seen.readers)
    writers = list(dict.fromkeys(seen.writers))
    return Topology(
        norms=norms,
        pairs=tuple(pair for found in seen.pairs if (pair := _pair(names, *found)) is not None),
        embedding=names.table.name,
        head=next((linear.name for linear in names.linears if linear.role == "head"), None),
        writers=tuple(linear.name for path in writers for linear in names.writing(path)),
        biases=tuple(bias for path in writers if (bias := names.bias(path)) is not None),
        width=names.table.columns,
        bias_of={
            linear.name: bias
            for path in names.of
            if (linear := names.alone(path)) is not None and (bias := names.bias(path)) is not None
        },
        mixed=_mixed(names, seen, norms),
    )


def _norm(names: _Names, seen: _Seen, path: str, module: nn.Module) -> Norm:
    readers = dict.fromkeys(seen.readers[path])
    matrices = [linear for reader in readers for linear in names.reading(reader)]
    unit, centered = _nature(module)
    return Norm(
        weight=names.tensors[f"{path}.weight"],
        bias=names.bias(path),
        unit=unit,
        centered=centered,
        residual=seen.norm_reads.get(path) == "stream",
        readers=tuple(linear.name for linear in matrices),
        only=path not in seen.spoiled
        and all(names.reading(reader) for reader in readers)
        and names.table not in matrices,
        block=matrices[0].block if matrices else None,
    )


def _pair(names: _Names, writer: str, reader: str, head: int) -> Pair | None:
    one, other = names.alone(writer), names.alone(reader)
    if one is None or other is None:
        return None
    return Pair(
        writer=one.name,
        reader=other.name,
        bias=names.bias(writer),
        head=head or None,
        repeats=other.columns // one.rows,
        block=one.block,
    )


def _mixed(names: _Names, seen: _Seen, norms: tuple[Norm, ...]) -> str | None:
    """Why the residual stream cannot be rotated."""
    if seen.mixed is not None:
        return seen.mixed
    unread = [path for path, kind in seen.norm_reads.items() if kind == "stream" and path not in seen.readers]
    if unread:
        return f"{unread[0]} reads the residual stream and no matrix reads it"
    if not any(names.head in readers for readers in seen.readers.values()):
        return "the head does not read a norm of the residual stream"
    if any(norm.residual and not norm.only and names.table.name not in norm.readers for norm in norms):
        return "something besides matrices reads a norm of the residual stream"
    if any(norm.residual and norm.centered for norm in norms):
        return "its norms subtract the mean, which a rotation does not keep"
    return None
