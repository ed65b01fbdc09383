"""Where the tensors of a Hugging Face model live in a GGUF file, for reader and writer alike.

Names come from the ``gguf`` package. What llama.cpp wants rearranged is little, and all of it can be
undone:

    llama     rows of q and k change places inside each head: transformers rotates dimension i with
              i + d/2, llama.cpp rotates neighbours 2i and 2i + 1
    gemma3    norms are stored as weight + 1
    gpt2      Conv1D weights are stored [in, out], llama.cpp multiplies with [out, in]
    experts   one tensor [experts, out, in] instead of one an expert

Rows change places, columns never do. Quantization groups run along columns, so packed rows are moved as
they are and nothing is decoded and rounded a second time.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from poise.core.errors import ExportError

Shapes = Mapping[str, tuple[int, ...]]

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""transformers' model type -> llama.cpp's architecture."""

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Endings of tensors in old checkpoints that are constants of the code, not weights."""

FLOAT32 = ("ffn_gate_inp.weight", "position_embd.weight")
"""Endings of matrices that llama.cpp keeps in float32 (routers, position tables)."""

EXTRAS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that transformers computes from the configuration."""

EXPERT = re.compile(r"(?P<stem>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.weight")
EXPERTS = {
    "mixtral": {"gate": "block_sparse_moe.experts.{}.w1", "up": "block_sparse_moe.experts.{}.w3",
                "down": "block_sparse_moe.experts.{}.w2"},
    "qwen3_moe": {part: f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")},
}  # fmt: skip
"""Model type -> part -> name of one expert's matrix inside a block, as folders on the hub store it."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor of a GGUF file and what it is made of.

    Attributes:
        name: its name in the GGUF file.
        sources: names of the Hugging Face tensors; more than one are stacked, [experts, out, in].
        shape: of one source, as the GGUF file orients it.
        stacked: whether the file holds [experts, ...].
        heads: heads whose rows are regrouped for rotary embeddings; 0 leaves the rows alone.
        transposed: the Hugging Face tensor is [in, out].
        shift: what is added to the values.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool = False
    heads: int = 0
    transposed: bool = False
    shift: float = 0.0

    @property
    def rows(self) -> int:
        """Rows of one source; all of a one-dimensional tensor is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def always_float32(self) -> bool:
        return len(self.shape) == 1 or self.name.endswith(FLOAT32)

    def row_order(self) -> Tensor | None:
        """For each row of the GGUF tensor the row of the Hugging Face tensor it holds."""
        return rope_order(self.shape[0], self.heads) if self.heads else None

    def to_gguf(self, tensor: Tensor) -> Tensor:
        """A source tensor's values in GGUF orientation and order."""
        if self.transposed:
            tensor = tensor.T
        if self.shift:
            tensor = tensor.float() + self.shift
        order = self.row_order()
        return tensor if order is None else tensor[order]

    def from_gguf(self, tensor: Tensor) -> Tensor:
        """Inverse of ``to_gguf``. Subtracting the shift loses what adding it had rounded away."""
        order = self.row_order()
        if order is not None:
            tensor = tensor[torch.argsort(order)]
        if self.shift:
            tensor = tensor - self.shift
        return tensor.T.contiguous() if self.transposed else tensor


def rope_order(rows: int, heads: int) -> Tensor:
    """Row i of llama.cpp's projection is row ``rope_order(...)[i]`` of transformers'."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def architecture(config: Mapping[str, Any]) -> str:
    """llama.cpp's name for the architecture of a ``config.json``.

    Raises:
        ExportError: Poise does not know how llama.cpp runs it.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"GGUF export does not support the architecture {kind!r}: "
            f"it supports {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[kind]


def slots(config: Mapping[str, Any], shapes: Shapes) -> list[Slot]:
    """The tensors of the GGUF file that Hugging Face tensors of these shapes become, in file order.

    Args:
        config: contents of ``config.json``, with all defaults filled in.
        shapes: shape of every tensor of the checkpoint by name.

    Raises:
        ExportError: a tensor has no place in llama.cpp's architecture, or experts are missing.
    """
    arch = architecture(config)
    found: dict[str, dict[int, str]] = {}
    names = _Names(arch, int(config.get("num_hidden_layers") or config["n_layer"]))
    for name in shapes:
        if not name.endswith(BUFFERS):
            target, expert = names.place(name)
            other = found.setdefault(target, {}).setdefault(expert, name)
            if other != name:
                raise ExportError(f"{name} and {other} would both become {target}")
    return [_slot(arch, config, shapes, name, found[name]) for name in sorted(found, key=_natural)]


def expert_names(model_type: str, block: int, part: str, count: int) -> list[str]:
    """Hugging Face names of the experts in a stack; ``part`` is ``gate``, ``up`` or ``down``."""
    pattern = EXPERTS[model_type][part]
    return [f"model.layers.{block}.{pattern.format(number)}.weight" for number in range(count)]


class _Names:
    """Hugging Face name -> GGUF name, by the table of the ``gguf`` package."""

    def __init__(self, arch: str, blocks: int) -> None:
        self.arch = arch
        number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
        self.table = gguf.get_tensor_name_map(number, blocks)

    def place(self, name: str) -> tuple[str, int]:
        """GGUF name of a tensor, and its expert number (0 for any other tensor)."""
        match = EXPERT.fullmatch(name)
        merged = f"{match['stem']}.{match['part']}.weight" if match else name
        target = self.table.get_name(merged, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(f"{name} has no place in llama.cpp's architecture {self.arch!r}")
        return target, int(match["number"]) if match else 0


def _slot(arch: str, config: Mapping[str, Any], shapes: Shapes, name: str, sources: dict[int, str]) -> Slot:
    stacked = "_exps." in name
    count = int(config.get("num_local_experts") or 0) if stacked else 1
    if sorted(sources) != list(range(count)) or len({shapes[source] for source in sources.values()}) != 1:
        raise ExportError(
            f"{name} stacks {count} experts of one shape, the checkpoint has "
            + ", ".join(f"{shapes[source]} {source}" for source in list(sources.values())[:3])
        )
    shape = tuple(shapes[sources[0]])
    heads = _heads(arch, config, name)
    if heads and shape[0] % (2 * heads):
        raise ExportError(f"{sources[0]}: {shape[0]} rows do not split into pairs of {heads} heads")
    transposed = arch == "gpt2" and len(shape) == 2 and name.startswith("blk.")
    return Slot(
        name=name,
        sources=tuple(sources[number] for number in range(count)),
        shape=shape[::-1] if transposed else shape,
        stacked=stacked,
        heads=heads,
        transposed=transposed,
        shift=1.0 if arch == "gemma3" and name.endswith("norm.weight") else 0.0,
    )


def _heads(arch: str, config: Mapping[str, Any], name: str) -> int:
    if arch != "llama":
        return 0
    if ".attn_q." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".attn_k." in name else 0


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
