"""The decoder blocks of a checkpoint, one in memory at a time.

The model is built with all its buffers but no weights. Its own ``forward`` runs once over stand-ins for the blocks,
which note what every block is called with (masks, position embeddings) and pass hidden states on; after that a block
can be called alone. The embedding holds only the rows of tokens that occur.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as functional_linear
from torch.overrides import TorchFunctionMode

from poise.checkpoints.linears import Skeleton
from poise.core.checkpoint import Checkpoint
from poise.core.errors import PoiseError
from poise.core.linear import Linear

Watch = Callable[[str, Tensor, Tensor | None], None]
"""Called with an input group, what it reads, [tokens, columns] float32, and for a writer (``Blocks.writers``) what the
residual stream holds where its output is added, [tokens, hidden]; None for others."""

WRITERS = ("attention.o", "ffn.down")
"""Roles of matrices whose outputs may be added to the residual stream as they are."""
SAME = 1e-4
"""Largest difference of two sums of the same terms, as a share of the largest value."""


class Reached(Exception):
    """Raised by a ``Watch``: ends a forward pass where there is nothing more to learn."""


class Blocks:
    """Runs a model block by block in float32.

    Args:
        checkpoint: the model.
        rounded: whether products of matrices may round their factors to bfloat16 while a block runs, and what watches it;
            they do where the processor is faster at that, and sum in float32.

    Raises:
        PoiseError: the architecture has no list of decoder blocks, or one that cannot be run alone.
    """

    def __init__(self, checkpoint: Checkpoint, *, rounded: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        self.checkpoint, self.rounded = checkpoint, rounded
        self.skeleton = Skeleton(checkpoint.config)
        if self.skeleton.blocks is None:
            raise PoiseError(
                f"{checkpoint.source}: no list of decoder blocks was found to calibrate block by block"
            )
        config = self.skeleton.config
        config._attn_implementation = "sdpa"
        config._experts_implementation = "eager"
        with _weightless(), torch.no_grad():
            self.model: Any = AutoModelForCausalLM.from_config(config).eval()
        self.layers: Any = self.model.get_submodule(self.skeleton.blocks)
        self._tensors: dict[int | None, list[str]] = {}
        for name in checkpoint.tensors():
            block = self.skeleton.block_of(self.skeleton.place(name).parameter)
            self._tensors.setdefault(block, []).append(name)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.index: int | None = None

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def begin(self, windows: Sequence[Sequence[int]], batch: int) -> Iterator[Tensor]:
        """Hidden states that enter the first block, [windows of a batch, tokens, hidden].

        Args:
            windows: token ids, all of one length.
        """
        used = sorted({token for window in windows for token in window})
        compact = {token: place for place, token in enumerate(used)}
        table = self.model.get_submodule(self.skeleton.embedding.rpartition(".")[0])
        self._load(name for name in self._tensors.get(None, []) if self._is_small(name))
        embedding = next(item for item in self.checkpoint.linears() if item.role == "embedding")
        rows = [self.checkpoint.read_rows(embedding, run).float() for run in _runs(used)]
        table._parameters["weight"] = nn.Parameter(torch.cat(rows), requires_grad=False)
        table.padding_idx = None
        ids = torch.tensor([[compact[token] for token in window] for window in windows])
        for number, part in enumerate(torch.split(ids, batch)):
            if number == 0:
                self._calls = self._record(part[:1])
            yield self._first(part)

    def _is_small(self, name: str) -> bool:
        """Norms and position tables, not the matrices over the vocabulary."""
        parameter = self.skeleton.place(name).parameter
        return parameter not in (self.skeleton.embedding, self.skeleton.head)

    def _first(self, ids: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def note(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen.append(_hidden(args, kwargs))
            raise Reached

        self._with_stand_ins(ids, note)
        return seen[0]

    def _record(self, ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of every block beside the hidden states."""
        for wrap in (lambda hidden: hidden, lambda hidden: (hidden,)):
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def note(
                index: int,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                calls: Any = calls,
                wrap: Any = wrap,
            ) -> Any:
                hidden = _hidden(args, kwargs)
                rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                calls.append((args[1:], rest))
                if hidden.dim() != 3 or index == len(self.layers) - 1:
                    raise Reached
                return wrap(hidden)

            self._with_stand_ins(ids, note)
            if len(calls) == len(self.layers):
                return calls
        raise PoiseError(f"{self.checkpoint.source}: its blocks cannot be run one by one")

    def _with_stand_ins(self, ids: Tensor, note: Any) -> None:
        real = list(self.layers)
        for index, block in enumerate(real):
            self.layers[index] = _StandIn(index, note, block)
        try:
            self.model(input_ids=ids, use_cache=False)
        except Reached:
            pass
        finally:
            for index, block in enumerate(real):
                self.layers[index] = block

    @torch.no_grad()
    def open(self, index: int) -> None:
        """Reads a block's weights; those of the block before are let go."""
        self.close()
        self._load(self._tensors[index])
        self.index = index
        lacking = [name for name, value in self.layers[index].named_parameters() if value.is_meta]
        if lacking:
            raise PoiseError(f"{self.checkpoint.source}: block {index} lacks {lacking[0]}")

    def close(self) -> None:
        """Lets go of the open block's weights."""
        if self.index is not None:
            for module in self.layers[self.index].modules():
                for name, value in module._parameters.items():
                    if value is not None:
                        module._parameters[name] = _meta(value)
            self.index = None

    def _load(self, names: Any) -> None:
        for name in names:
            self.fill(name, self.checkpoint.read(name))

    def fill(self, name: str, value: Tensor) -> None:
        """Puts a tensor of the checkpoint where it belongs."""
        fill(self.model, self.skeleton, name, value)

    @torch.no_grad()
    def put(self, linear: Linear, weight: Tensor) -> None:
        """Replaces a matrix of the open block, [rows, columns]."""
        self.fill(linear.name, as_stored(linear, weight))

    def products(self) -> AbstractContextManager[None]:
        """Products inside are rounded as those of a block are."""
        return rounded_products() if self.rounded else nullcontext()

    @torch.no_grad()
    def run(self, hidden: Tensor) -> Tensor:
        """What the open block makes of hidden states [batch, tokens, hidden]."""
        args, kwargs = self._calls[self.index or 0]
        with self.products():
            out = self.layers[self.index](hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def run_linear(self, path: str, x: Tensor) -> Tensor:
        """What a linear of the open block makes of what it reads, [tokens, columns]."""
        with self.products():
            out: Tensor = self.model.get_submodule(path)(x)
        return out

    @torch.no_grad()
    def writers(self, hidden: Tensor, linears: Sequence[Linear]) -> tuple[str, ...]:
        """Paths of the linears whose outputs the open block adds to the residual stream.

        None where that is not all that it does: where norms or factors come between, or experts write too.

        Args:
            hidden: any states, to see whether the sum comes out.
        """
        paths = [linear.input_group for linear in linears if linear.role in WRITERS]
        paths = [path for path in paths if self.dense(path)]
        stream = _Residual(hidden)
        handles = stream.follow(self.model.get_submodule(path) for path in paths)
        try:
            out = self.run(hidden)
        finally:
            for handle in handles:
                handle.remove()
        apart = float((out - stream.state).abs().max())
        return tuple(paths) if apart <= SAME * float(out.abs().max()) else ()

    @torch.no_grad()
    def watch(
        self,
        hidden: Tensor,
        groups: Sequence[str],
        see: Watch,
        *,
        whole: bool,
        writers: Sequence[str] = (),
    ) -> Tensor | None:
        """Runs the open block and shows what input groups read.

        Args:
            groups: names of input groups, in the order in which the block reaches them.
            whole: whether the output is wanted; if not, the run ends with the last group.
            writers: groups for which the residual stream is shown too.
        """
        modules, experts = self._watched(groups)
        last = None if whole or experts or not groups else groups[-1]
        stream = _Residual(hidden)
        handles = stream.follow(self.model.get_submodule(path) for path in writers)
        for path, module in modules.items():
            show = _shower(path, see, path == last, stream if path in writers else None)
            handles.append(module.register_forward_pre_hook(show, with_kwargs=True))
        try:
            with _Experts(experts, see):
                return self.run(hidden)
        except Reached:
            return None
        finally:
            for handle in handles:
                handle.remove()

    def _watched(self, groups: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """Modules of dense groups, and modules that own stacks of experts."""
        dense: dict[str, nn.Module] = {}
        experts: dict[str, nn.Module] = {}
        for group in groups:
            try:
                dense[group] = self.model.get_submodule(group)
            except AttributeError:
                path = group.rpartition(".")[0]
                path = path.rpartition(".")[0] if path.rpartition(".")[2].isdigit() else path
                experts[path] = self.model.get_submodule(path)
        return dense, experts

    def module_path(self, linear: Linear) -> str | None:
        """The linear module that a matrix belongs to; None for experts."""
        place = self.skeleton.place(linear.name)
        return (
            None
            if place.expert is not None or linear.experts is not None
            else place.parameter.rpartition(".")[0]
        )

    def dense(self, group: str) -> bool:
        """Whether all tokens come to this group; else a router chooses them."""
        return not self._watched([group])[1]

    def pool_of(self, group: str) -> str | None:
        """The group of what all experts of a layer read, for the group of one of them; None for others."""
        parts = re.fullmatch(r"(.+)\.\d+(\.down)?", group)
        if parts is None or self.dense(group):
            return None
        return parts[1] + (parts[2] or ".gate_up")

    def groups(self, linears: Sequence[Linear]) -> list[list[str]]:
        """Input groups of linears in the order in which they are reached; experts of one module go together."""
        order = {path: number for number, path in enumerate(self.skeleton.inputs.values())}
        found: dict[str, list[str]] = {}
        for group in dict.fromkeys(linear.input_group for linear in linears):
            _, experts = self._watched([group])
            found.setdefault(next(iter(experts), group), []).append(group)
        return [found[key] for key in sorted(found, key=lambda key: order.get(key, len(order)))]

    @torch.no_grad()
    def finish(self, hidden: Tensor) -> Tensor:
        """What the head reads, for hidden states that leave the last block."""
        seen: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise Reached

        def pass_on(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return hidden

        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(note)
        try:
            self._with_stand_ins(torch.zeros(hidden.shape[:2], dtype=torch.long), pass_on)
        finally:
            handle.remove()
        return seen[0]


def fill(
    model: nn.Module, skeleton: Skeleton, name: str, value: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """Puts a tensor of the file where it belongs in a model: experts may be parts of a fused parameter."""
    place = skeleton.place(name)
    path, _, leaf = place.parameter.rpartition(".")
    module = model.get_submodule(path)
    if place.expert is None:
        module._parameters[leaf] = nn.Parameter(value.to(dtype), requires_grad=False)
        return
    old = module._parameters[leaf]
    assert old is not None  # experts have weights
    if old.is_meta:
        old = module._parameters[leaf] = nn.Parameter(torch.empty(old.shape), requires_grad=False)
    target = old.data[place.expert]
    half = len(target) // 2
    part = {"gate": slice(0, half), "up": slice(half, None), "down": slice(None)}[place.part]
    target[part] = value.to(dtype)


def as_stored(linear: Linear, weight: Tensor) -> Tensor:
    """A matrix [rows, columns] in the shape of its tensor in the file."""
    value = weight if linear.experts is None else weight.view(linear.experts, -1, linear.columns)
    return value.transpose(-1, -2).contiguous() if linear.transposed else value


class _StandIn(nn.Module):
    """Answers in a block's place."""

    def __init__(self, index: int, note: Any, block: nn.Module) -> None:
        super().__init__()
        self.index, self.note = index, note
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.note(self.index, args, kwargs)


class _Experts(TorchFunctionMode):
    """Shows what the experts of stacked parameters read: a slice of the parameter tells which expert it is."""

    def __init__(self, modules: dict[str, nn.Module], see: Watch) -> None:
        super().__init__()
        self.see = see
        self.stacks = {
            value.data_ptr(): (path, name, value)
            for path, module in modules.items()
            for name, value in module.named_parameters(recurse=False)
            if value.dim() == 3
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional_linear and self.stacks:
            x, weight = args[0], args[1]
            for start, (path, name, stack) in self.stacks.items():
                offset = weight.data_ptr() - start
                size = stack[0].numel() * stack.element_size()
                if 0 <= offset < size * len(stack) and offset % size == 0:
                    expert, down = offset // size, "down" in name
                    flat = x.reshape(-1, x.shape[-1]).float()
                    self.see(f"{path}.{expert}" + (".down" if down else ""), flat, None)
                    self.see(f"{path}.{'down' if down else 'gate_up'}", flat, None)
        return func(*args, **(kwargs or {}))


class _Residual:
    """What the residual stream holds while a block runs in this thread: what came in and what was written since."""

    def __init__(self, hidden: Tensor) -> None:
        self.state, self.thread = hidden, get_ident()

    def follow(self, writers: Iterable[nn.Module]) -> list[Any]:
        """Handles of the hooks that add what modules put out."""
        return [module.register_forward_hook(self._add) for module in writers]

    def _add(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if get_ident() == self.thread:
            self.state = self.state + out.view(self.state.shape)


def _shower(path: str, see: Watch, last: bool, stream: _Residual | None) -> Any:
    """A hook for runs of this thread alone: others may wait in the same block."""
    thread = get_ident()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() != thread:
            return
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if x.numel():
            held = None if stream is None else stream.state.reshape(-1, stream.state.shape[-1])
            see(path, x.reshape(-1, x.shape[-1]).float(), held)
        if last:
            raise Reached

    return hook


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _runs(numbers: Sequence[int]) -> Iterator[slice]:
    """Slices that together are these ascending numbers."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield slice(numbers[start], numbers[place - 1] + 1)
            start = place


def _meta(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to("meta"), requires_grad=False)


@contextmanager
def _weightless() -> Iterator[None]:
    """Modules made inside have buffers, and parameters that take no memory."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, None if parameter is None else _meta(parameter))

    nn.Module.register_parameter = on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def rounded_products() -> Iterator[None]:
    """Products of float32 matrices inside may have factors in bfloat16; versions of torch that cannot say so keep float32."""
    setting: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if setting is None:
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
