"""compressed-tensors: a Hugging Face folder whose quantized weights transformers and vLLM load.

A quantized layer ``m`` is stored as a handful of tensors beside each other. ``pack-quantized`` holds
``m.weight_packed`` (codes, int32 words along the inputs), ``m.weight_scale`` [out, groups],
``m.weight_shape`` and, for asymmetric grids, ``m.weight_zero_point`` (words along the outputs).
``int-quantized`` holds ``m.weight`` as int8 and ``m.weight_scale`` [out, 1]: what integer matrix products
read. ``quantization_config`` in ``config.json`` says which layers are stored how, as one *config group*
for each distinct scheme with the layers it targets.

Codes are written as the solver found them; nothing is rounded a second time. Only what both engines load
is accepted, and the reasons below say what each of them does.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.errors import ExportError
from poise.core.exporter import Codes, Exporter
from poise.core.format import Format, QTensor
from poise.core.linear import Linear
from poise.core.plan import Plan, PlanRow
from poise.core.registry import build, name_of

LAYOUT_VERSION = "0.20.0"
"""The release of compressed-tensors whose layout this is; codes of 3, 5, 6 and 7 bits are packed densely."""

SHARD_BYTES = 500_000_000
"""Largest file of weights: an export holds one of them in memory, and the largest tensor."""

GROUPS = (256, 128, 64, 32, 16)
FUSED = {
    "attention.q": "attention",
    "attention.k": "attention",
    "attention.v": "attention",
    "ffn.gate": "ffn",
    "ffn.up": "ffn",
}
"""Roles that vLLM computes as one matrix product when they read the same activation."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a layer is stored and computed: one config group.

    Attributes:
        layout: ``pack-quantized`` or ``int-quantized``.
        bits: of a weight.
        group: inputs that share a scale, None for one scale an output.
        symmetric: whether there are no zero points.
        activations: bits of the dynamic per-token activations, None when they are left alone.
    """

    layout: str
    bits: int
    group: int | None
    symmetric: bool
    activations: int | None

    def config(self, targets: list[str]) -> dict[str, Any]:
        """The entry of ``config_groups``; keys that both engines' releases know, no others."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group is None else "group",
            "group_size": self.group,
            "dynamic": False,
        }
        inputs = None
        if self.activations is not None:
            inputs = {"num_bits": self.activations, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.layout,
        }


@dataclass(kw_only=True)
class CompressedTensors(Exporter):
    """Writes ``config.json``, safetensors shards with their index, and the tokenizer's files.

    Attributes:
        shard_bytes: largest file of weights, except for a tensor that is larger by itself.
    """

    shard_bytes: int = SHARD_BYTES
    engines: ClassVar[tuple[str, ...]] = ("transformers", "vLLM")
    _dtype: str | None = field(default=None, init=False, repr=False)
    """Of the model that was checked last: formats that are not stored in it are refused."""

    def check(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.config.get("model_type"):
            raise ExportError(f"{checkpoint.source}: config.json names no model_type, by which both engines load")
        self._dtype = _name(checkpoint.dtype)

    def scale_dtype(self, checkpoint: Checkpoint) -> str:
        """The model's own dtype: both engines keep scales in it, and a wider one would be rounded on loading.

        A float32 model therefore gets float32 scales. transformers loads them as they are; vLLM does so
        when it runs in float32 and rounds all of the model, scales included, when it runs in less.
        """
        self._dtype = _name(checkpoint.dtype)
        return self._dtype

    def accepts(self, linear: Linear, format: Format, activations: int | None) -> str | None:
        kind = name_of(format)
        if kind == "float":
            return self._float_reason(format, activations)
        if kind != "int":
            return f"compressed-tensors has no layout for {kind}: it holds int, and float in the model's own dtype"
        return (
            _place_reason(linear)
            or self._grid_reason(linear, format)
            or _activation_reason(linear, format, activations)
        )

    def export(self, checkpoint: Checkpoint, plan: Plan, codes: Codes, folder: Path) -> Path:
        self.check(checkpoint)
        linears = {linear.name: linear for linear in checkpoint.linears()}
        self._check_rows(plan, linears)
        check_fused(plan, linears.values())
        for name, content in checkpoint.sidecars().items():
            (folder / name).write_bytes(content)
        config = {**checkpoint.config, "dtype": _name(checkpoint.dtype)}
        for stale in ("torch_dtype", "quantization_config"):
            config.pop(stale, None)
        groups = quantization_config(plan)
        if groups is not None:
            config["quantization_config"] = groups
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_shards(_tensors(checkpoint, plan, linears, codes), folder, self.shard_bytes)
        return folder

    def _check_rows(self, plan: Plan, linears: dict[str, Linear]) -> None:
        """A plan may come from a file: what it asks for is asked of ``accepts`` once more."""
        for row in plan.quantized:
            if row.name not in linears:
                raise ExportError(f"the plan quantizes {row.name}, which is no matrix of this model")
            reason = self.accepts(linears[row.name], _format(row), row.activations)
            if reason is not None:
                raise ExportError(f"{row.name}: cannot store {row.format}: {reason}")

    def _float_reason(self, format: Any, activations: int | None) -> str | None:
        if activations is not None:
            return "activations are rounded for integer weights only"
        if self._dtype not in (None, format.dtype):
            return (
                f"the model is {self._dtype} and both engines load every float in that dtype: "
                f"use float(dtype='{self._dtype}')"
            )
        return None

    def _grid_reason(self, linear: Linear, format: Any) -> str | None:
        if not format.symmetric and format.zero != "integer":
            return f'compressed-tensors stores integer zero points only: use zero="integer", not {format.zero!r}'
        if format.group == "tensor":
            return 'one scale for a whole tensor has no kernel for weights alone: use group="channel" or a number'
        if isinstance(format.group, int) and linear.columns % format.group:
            fitting = [str(group) for group in GROUPS if linear.columns % group == 0]
            instead = f"groups of {', '.join(fitting)} do" if fitting else 'use group="channel"'
            return f"rows of {linear.columns} do not divide into groups of {format.group}; {instead}"
        if self._dtype is not None and format.scale not in ("auto", self._dtype):
            return (
                f"scales are {format.scale}, but both engines hold them in the model's dtype, {self._dtype}: "
                "leave scale at auto"
            )
        return None


def _place_reason(linear: Linear) -> str | None:
    """Layers that are no plain linear layer in both engines."""
    if linear.experts is not None:
        return "the experts are stored as one tensor, which neither engine loads quantized from compressed-tensors"
    if linear.transposed:
        return "the weight is stored transposed (Conv1D), and both engines quantize linear layers only"
    if linear.role == "router":
        return "a router must keep full precision: transformers and vLLM build it without quantization"
    return None


def _activation_reason(linear: Linear, format: Any, activations: int | None) -> str | None:
    if activations is None:
        return None
    if activations != 8:
        return f"both engines round activations to 8 bits, not to {activations}"
    if linear.role.startswith("expert."):
        return "transformers loads quantized experts without rounding their activations"
    if not format.symmetric:
        return "integer matrix products need symmetric weights: use symmetric=True"
    return None


def check_fused(plan: Plan, linears: Iterable[Linear]) -> None:
    """Layers that an engine computes together must be stored alike.

    vLLM concatenates q, k, v and gate, up; it computes all matrices of a layer's experts in one kernel,
    and transformers loads the experts of all layers with one scheme.

    Raises:
        ExportError: names the tensors that differ.
    """
    together: dict[tuple[str, str], list[str]] = {}
    for linear in linears:
        if linear.role in FUSED:
            together.setdefault((linear.input_group, FUSED[linear.role]), []).append(linear.name)
        elif linear.role.startswith("expert."):
            together.setdefault(("", "expert"), []).append(linear.name)
    schemes = {row.name: scheme_of(row) for row in plan.rows}
    for (_, kind), names in together.items():
        first = {schemes.get(name): name for name in reversed(names)}
        if len(first) > 1:
            stored = "; ".join(f"{name} as {_spell(plan.row(name))}" for name in sorted(first.values()))
            who = "both engines load all experts" if kind == "expert" else "vLLM computes them as one matrix and loads them"
            raise ExportError(f"{who} with one format, but the plan stores {stored}. Give them the same format")


def scheme_of(row: PlanRow) -> Scheme | None:
    """How a matrix is stored; None for floating-point weights."""
    if row.kept:
        return None
    format: Any = _format(row)
    if name_of(format) != "int":
        return None
    integer = row.activations == 8 and format.bits == 8
    return Scheme(
        layout="int-quantized" if integer else "pack-quantized",
        bits=format.bits,
        group=None if format.group == "channel" else format.group,
        symmetric=format.symmetric,
        activations=row.activations,
    )


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """What ``config.json`` says about the quantization; None when nothing is quantized."""
    members: dict[Scheme | None, list[str]] = {}
    for row in plan.rows:
        members.setdefault(scheme_of(row), []).append(row.name.removesuffix(".weight"))
    kept = members.pop(None, [])
    if not members:
        return None
    everything = [row.name.removesuffix(".weight") for row in plan.rows]
    schemes = sorted((scheme for scheme in members if scheme), key=lambda scheme: str(asdict(scheme)))
    layouts = {scheme.layout for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "version": LAYOUT_VERSION,
        "quantization_status": "compressed",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{number}": scheme.config(patterns(members[scheme], everything))
            for number, scheme in enumerate(schemes)
        },
        "ignore": patterns(kept, everything),
    }


def patterns(names: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Regular expressions that match these modules and no other of the model.

    ``model.layers.0.mlp.up_proj`` and its like become ``re:.*\\\\blayers\\\\.\\\\d+\\\\.mlp\\\\.up_proj$`` when
    all layers are meant, else the layers are listed. What stands before the first number is left open
    because engines nest the same layers differently, and the list stays short for thousands of experts.
    """
    wanted = set(names)
    found: dict[str, list[str]] = {}
    for name in everything:
        found.setdefault(re.sub(r"\d+", "#", _inner(name)), []).append(name)
    result = []
    for shape, members in found.items():
        meant = [name for name in members if name in wanted]
        layers = sorted({int(number) for name in meant for number in re.findall(r"\d+", _inner(name))[:1]})
        if not meant:
            continue
        text = re.escape(shape).replace(r"\#", r"\d+")
        if len(meant) < len(members):
            text = text.replace(r"\d+", f"(?:{'|'.join(map(str, layers))})", 1)
        result.append(rf"re:.*\b{text}$")
    return result


def _inner(name: str) -> str:
    """The part of a module's path that engines agree on: from the list of layers on, or its last word."""
    numbered = re.search(r"[^.]+\.\d+\..*", name)
    return numbered.group(0) if numbered else name.rpartition(".")[2]


def _tensors(
    checkpoint: Checkpoint, plan: Plan, linears: dict[str, Linear], codes: Codes
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder, one weight in memory at a time."""
    rows = {row.name: row for row in plan.quantized}
    for name, info in checkpoint.tensors().items():
        if name not in rows:
            tensor = checkpoint.read(name)
            lossless = isinstance(getattr(torch, info.stored, None), torch.dtype)
            yield name, tensor if lossless or not tensor.is_floating_point() else tensor.to(checkpoint.dtype)
            continue
        scheme, weight = scheme_of(rows[name]), codes(name)
        if scheme is None:
            yield name, _as_stored(weight.pack()["values"], linears[name])
        else:
            for part, tensor in layout(weight, scheme).items():
                yield f"{name.removesuffix('weight')}{part}", tensor


def layout(weight: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one layer under compressed-tensors' names; codes go in unchanged."""
    if scheme.layout == "int-quantized":
        return {"weight": weight.codes.contiguous(), "weight_scale": weight.params["scale"].contiguous()}
    stored = weight.pack()
    parts = {
        "weight_packed": stored["packed"],
        "weight_scale": stored["scale"].contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if "zero_packed" in stored:
        parts["weight_zero_point"] = stored["zero_packed"].T.contiguous()
    return parts


def _as_stored(matrix: Tensor, linear: Linear) -> Tensor:
    """Inverse of ``Checkpoint.read_matrix``."""
    if linear.experts is not None:
        matrix = matrix.view(linear.experts, -1, linear.columns)
    return (matrix.transpose(-1, -2) if linear.transposed else matrix).contiguous()


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int) -> None:
    """``model.safetensors``, or numbered shards of at most ``limit`` bytes with an index.

    The number of shards is part of their names and known last, so they are renamed at the end.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards) + 1}"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner can read
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > limit:
            flush()
            held = 0
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / "model.safetensors")
        return
    places = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        places.update(dict.fromkeys(members, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _format(row: PlanRow) -> Format:
    format: Format = build("format", row.format or "")
    return format


def _spell(row: PlanRow | None) -> str:
    if row is None or row.format is None:
        return "floating point"
    return row.format if row.activations is None else f"{row.format} with {row.activations}-bit activations"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
