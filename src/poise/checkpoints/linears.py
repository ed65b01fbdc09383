"""Which tensors of a checkpoint are linear layers, and what each one does.

Nothing here lists model names. The architecture is built on torch's meta device (shapes, no memory) and
a few tokens are traced through it: linears that receive the very same tensor read the same activation.
Roles follow from where a layer stands: inside an attention module or not, what it reads, and in which
order. Names of tensors in the file are translated to those of the modules by transformers' own
conversion rules, so experts stored one by one and experts stored fused are both recognised.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poise.core.errors import CheckpointError
from poise.core.linear import Linear

Shapes = Mapping[str, tuple[int, ...]]


class _Place(NamedTuple):
    """Where a tensor of the file goes: the parameter, and for one expert of many its number and part."""

    parameter: str
    expert: int | None
    part: str


class Skeleton:
    """An architecture without weights.

    Args:
        config: contents of ``config.json``.

    Raises:
        CheckpointError: transformers knows no causal language model of this type, or refuses the values.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        model_type = config.get("model_type")
        if not model_type:
            raise CheckpointError("config.json names no model_type: Poise cannot tell the architecture")
        values = {
            key: value for key, value in config.items() if key not in ("model_type", "quantization_config")
        }
        try:
            self.config = AutoConfig.for_model(model_type, **values)
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(self.config)
        except Exception as error:  # transformers raises whatever its model code does
            raise CheckpointError(
                f"unknown architecture {model_type!r}: transformers cannot build a causal language model "
                f"from this config ({str(error).splitlines()[0][:200]})"
            ) from error

    @cached_property
    def _conversions(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        rules = get_model_conversion_mapping(self.model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        return [rule for rule in rules if not isinstance(rule, WeightConverter)], converters

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's own parameters, tied ones under every name."""
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: tuple(parameter.shape) for name, parameter in named}

    def place(self, name: str) -> _Place:
        """The parameter that a tensor of the file belongs to."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters = self._conversions
        parameter, pattern = rename_source_key(
            name, renamings, converters, self.model.base_model_prefix, self._state
        )
        number = (
            re.search(r"\.(\d+)\.[^.]+(\.weight)?$", name)
            if parameter not in self.parameters or pattern
            else None
        )
        if pattern is None or number is None or "*" not in pattern:
            return _Place(parameter, None, "")
        rule = next(rule for rule in converters if pattern in rule.source_patterns)
        sources = list(rule.source_patterns)
        part = ("down",) if len(sources) == 1 else ("gate", "up")
        return _Place(parameter, int(number.group(1)), part[sources.index(pattern)])

    def module_of(self, parameter: str) -> nn.Module | None:
        try:
            module: nn.Module = self.model.get_submodule(parameter.rpartition(".")[0])
        except AttributeError:
            return None
        return module

    @cached_property
    def head(self) -> str | None:
        """Name of the output head's weight."""
        head = self.model.get_output_embeddings()
        return next((f"{name}.weight" for name, module in self.model.named_modules() if module is head), None)

    @cached_property
    def embedding(self) -> str:
        """Name of the input embedding's weight."""
        table = self.model.get_input_embeddings()
        return next(f"{name}.weight" for name, module in self.model.named_modules() if module is table)

    @property
    def tied(self) -> bool:
        """Whether the head has no weight of its own."""
        text_config = self.config.get_text_config()
        return bool(getattr(text_config, "tie_word_embeddings", False))

    @cached_property
    def blocks(self) -> str | None:
        """Path of the list of decoder blocks: the outermost one with an entry for every layer."""
        count = getattr(self.config.get_text_config(), "num_hidden_layers", 0)
        lists = [
            name for name, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count
        ]
        return min(lists, key=len, default=None)

    def block_of(self, parameter: str) -> int | None:
        match = re.match(rf"{re.escape(self.blocks)}\.(\d+)\.", parameter) if self.blocks else None
        return int(match.group(1)) if match else None

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Module path -> input group: the first module that reads the same activation, in traced order."""
        order: list[tuple[str, Tensor]] = []
        handles = []
        for name, module in self.model.named_modules():
            if _is_linear(module) or is_experts(module):
                handles.append(module.register_forward_pre_hook(_recorder(order, name), with_kwargs=True))
        try:
            self.run()
        finally:
            for handle in handles:
                handle.remove()
        first: dict[int, str] = {}
        return {name: first.setdefault(id(value), name) for name, value in order}

    def run(self) -> None:
        """Sends four meta tokens through; models differ in which attention mask spares them real numbers."""
        for module in self.model.modules():
            if is_experts(module):
                module.forward = _keep_shape  # routing needs real numbers
        tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
        masks = (torch.zeros(1, 1, 4, 4, device="meta"), None)
        for mask in masks:
            try:
                with torch.no_grad():
                    self.model(input_ids=tokens, attention_mask=mask, use_cache=False)
                return
            except (RuntimeError, ValueError, NotImplementedError, TypeError):
                continue  # layers that were not reached get an input group of their own


def find_linears(config: dict[str, Any], shapes: Shapes) -> list[Linear]:
    """The matrices of a checkpoint that a plan may quantize, block by block.

    Norms, biases and position tables are not among them: nothing multiplies an activation with them.

    Args:
        config: contents of ``config.json``.
        shapes: shape of every tensor in the file by name.

    Raises:
        CheckpointError: unknown architecture, or a tensor whose shape contradicts the configuration.
    """
    return linears_of(Skeleton(config), shapes)


def linears_of(skeleton: Skeleton, shapes: Shapes) -> list[Linear]:
    """As ``find_linears``, for an architecture that is already built."""
    found = []
    for name, shape in shapes.items():
        place = skeleton.place(name)
        _check_shape(skeleton, name, shape, place)
        linear = _linear(skeleton, name, shape, place)
        if linear is not None:
            found.append(linear)
    position = {name: index for index, name in enumerate(skeleton.parameters)}
    return sorted(
        found, key=lambda item: (position[skeleton.place(item.name).parameter], _numbers(item.name))
    )


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _check_shape(skeleton: Skeleton, name: str, shape: tuple[int, ...], place: _Place) -> None:
    expected = skeleton.parameters.get(place.parameter)
    if expected is not None and place.expert is None and expected != tuple(shape):
        raise CheckpointError(f"{name} has shape {list(shape)}, the configuration asks for {list(expected)}")


def _linear(skeleton: Skeleton, name: str, shape: tuple[int, ...], place: _Place) -> Linear | None:
    module = skeleton.module_of(place.parameter)
    if module is None or place.parameter not in skeleton.parameters or len(shape) not in (2, 3):
        return None
    path = place.parameter.rpartition(".")[0]
    block = skeleton.block_of(place.parameter)
    if place.parameter == skeleton.embedding:
        rows, columns = shape
        tied = skeleton.tied and skeleton.head is not None
        return Linear(
            name=name, rows=rows, columns=columns, role="embedding", block=None, input_group=path, tied=tied
        )
    if isinstance(module, nn.Embedding) or not place.parameter.endswith(("weight", "proj")):
        return None
    if is_experts(module):
        return _expert_linear(name, shape, place, path, block, bool(getattr(module, "is_transposed", False)))
    if len(shape) != 2:
        return None
    transposed = _is_conv1d(module)
    rows, columns = reversed(shape) if transposed else shape
    return Linear(
        name=name,
        rows=rows,
        columns=columns,
        role=_role(skeleton, place.parameter, path, rows, columns),
        block=block,
        input_group=skeleton.inputs.get(path, path),
        transposed=transposed,
    )


def _expert_linear(
    name: str, shape: tuple[int, ...], place: _Place, path: str, block: int | None, transposed: bool
) -> Linear:
    if len(shape) == 2:
        group = f"{path}.{place.expert}" + (".down" if place.part == "down" else "")
        rows, columns = shape
        return Linear(
            name=name, rows=rows, columns=columns, role=f"expert.{place.part}", block=block, input_group=group
        )
    experts, rows, columns = shape
    rows, columns = (columns, rows) if transposed else (rows, columns)
    part = "down" if "down" in place.parameter.rpartition(".")[2] else "gate_up"
    return Linear(
        name=name,
        rows=experts * rows,
        columns=columns,
        role=f"expert.{part}",
        block=block,
        input_group=f"{path}.{part}",
        experts=experts,
        transposed=transposed,
    )


def _role(skeleton: Skeleton, parameter: str, path: str, rows: int, columns: int) -> str:
    if parameter == skeleton.head:
        return "head"
    if skeleton.block_of(parameter) is None:
        return "other"
    if not _is_linear(skeleton.model.get_submodule(path)):
        return "router" if _beside_experts(skeleton, path) else "other"
    attention = _attention_of(skeleton, path)
    if attention is not None:
        return _attention_role(skeleton, attention, path)
    if rows == 1 or (_beside_experts(skeleton, path) and not path.rpartition(".")[0].endswith("expert")):
        return "router"
    return _ffn_role(skeleton, path, rows)


def _attention_of(skeleton: Skeleton, path: str) -> str | None:
    """The innermost attention module around a layer."""
    while path := path.rpartition(".")[0]:
        if "Attention" in type(skeleton.model.get_submodule(path)).__name__:
            return path
    return None


def _attention_role(skeleton: Skeleton, attention: str, path: str) -> str:
    inside = [name for name in skeleton.inputs if name.startswith(attention + ".")]
    leaf = path.rpartition(".")[2].lower()
    if (inside and path == inside[-1] and len(inside) > 1) or leaf.startswith(("o_", "out", "dense")):
        return "attention.o"
    if re.match(r"w?qkv|c_attn|kv|query_key_value|in_proj", leaf) or len(inside) == 2:
        return "attention.qkv"
    letter = re.match(r"w?([qkv])(_|$|\d|uery|ey|alue)", leaf)
    return f"attention.{letter.group(1)}" if letter else "other"


def _ffn_role(skeleton: Skeleton, path: str, rows: int) -> str:
    """Gate and up read one activation, down reads their product; a fused gate_up is twice as tall."""
    parent = path.rpartition(".")[0]
    block = re.match(rf"{re.escape(skeleton.blocks or '')}\.\d+", path)
    prefix = parent if block is None or parent != block.group(0) else block.group(0)
    siblings = [
        name
        for name in skeleton.inputs
        if name.startswith(prefix + ".")
        and name.rpartition(".")[0] == parent
        and not _beside_experts_leaf(skeleton, name)
    ]
    together = [name for name in siblings if skeleton.inputs[name] == skeleton.inputs.get(path)]
    if siblings and path == siblings[-1] and len(together) == 1 and len(siblings) > 1:
        return "ffn.down"
    if len(together) == 1:
        down = skeleton.model.get_submodule(siblings[-1]) if siblings else None
        inner = skeleton.parameters.get(f"{siblings[-1]}.weight", (0, 0)) if down is not None else (0, 0)
        inner_width = inner[0] if _is_conv1d(down) else inner[1]
        return "ffn.gate_up" if rows == 2 * inner_width else "ffn.up"
    leaf = path.rpartition(".")[2].lower()
    return "ffn.gate" if re.search(r"gate|w1$", leaf) else "ffn.up"


def _beside_experts(skeleton: Skeleton, path: str) -> bool:
    parent = skeleton.model.get_submodule(path.rpartition(".")[0])
    return any(is_experts(child) for child in parent.children())


def _beside_experts_leaf(skeleton: Skeleton, name: str) -> bool:
    return is_experts(skeleton.model.get_submodule(name))


def _is_conv1d(module: nn.Module | None) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def is_experts(module: nn.Module) -> bool:
    """A module that owns a stack of matrices, [experts, ., .]."""
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)) and not isinstance(
        module, nn.modules.conv._ConvNd
    )


def _keep_shape(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(hidden)


def _recorder(order: list[tuple[str, Tensor]], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        order.append((name, next(values)))

    return hook
