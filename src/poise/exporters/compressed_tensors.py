"""compressed-tensors: a Hugging Face folder whose quantized weights transformers and vLLM load.

Codes are written as the solver found them; nothing is rounded a second time. What is accepted loads in
both engines, measured with transformers 5.23, compressed-tensors 0.20 and vLLM 0.32; each reason below
says which of them fails, and how. What loads may still lack a kernel on some machine: on x86 CPUs vLLM
runs 4-bit weights of layers whose sides are multiples of 32, and 8-bit weights with 8-bit activations;
other widths and quantized experts need a GPU there, and single bits run in transformers only.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.errors import ExportError
from poise.core.exporter import Codes, Exporter
from poise.core.format import Format
from poise.core.linear import Linear
from poise.core.plan import Plan, PlanRow
from poise.core.registry import build, name_of
from poise.layouts.compressed_tensors import layer_tensors, quantization_config, scheme_of

SHARD_BYTES = 500_000_000
"""Largest file of weights. An export holds one of them in memory, and the largest tensor."""

GROUPS = (256, 128, 64, 32, 16)
FUSED = {
    "attention.q": "attention",
    "attention.k": "attention",
    "attention.v": "attention",
    "ffn.gate": "ffn",
    "ffn.up": "ffn",
}
"""Roles whose weights vLLM joins to one matrix when they read the same activation."""


class CompressedTensors(Exporter):
    """Writes ``config.json``, safetensors shards with their index, and the tokenizer's files.

    Args:
        shard_bytes: largest file of weights, unless a tensor is larger by itself.
    """

    engines: ClassVar[tuple[str, ...]] = ("transformers", "vLLM")

    def __init__(self, shard_bytes: int = SHARD_BYTES) -> None:
        self.shard_bytes = shard_bytes
        self._dtype: str | None = None  # of the model that was checked last; other dtypes are refused

    def check(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.config.get("model_type"):
            raise ExportError(f"{checkpoint.source}: no model_type in its config, by which engines load")
        self._dtype = _name(checkpoint.dtype)

    def scale_dtype(self, checkpoint: Checkpoint) -> str:
        """The model's own dtype: both engines hold scales in it and would round wider ones.

        A float32 model gets float32 scales: exact in transformers, and in vLLM when it is told to run in
        float32. Left to itself vLLM runs such a model in 16 bits and rounds all of it, scales included.
        """
        self._dtype = _name(checkpoint.dtype)
        return self._dtype

    def accepts(self, linear: Linear, format: Format, activations: int | None) -> str | None:
        kind = name_of(format)
        if kind == "float":
            return self._float_reason(format, activations)
        if kind != "int":
            return f"compressed-tensors has no layout for {kind}; it takes int, or the model's own float"
        reason = _place_reason(linear, format) or self._grid_reason(linear, format)
        return reason or _activation_reason(linear, format, activations)

    def check_plan(self, checkpoint: Checkpoint, plan: Plan) -> None:
        """What no matrix can tell by itself: whether the plan as a whole loads.

        Raises:
            ExportError: names the tensors that are in the way.
        """
        self.check(checkpoint)
        linears = {linear.name: linear for linear in checkpoint.linears()}
        for row in plan.quantized:
            if row.name not in linears:
                raise ExportError(f"the plan quantizes {row.name}, which is no matrix of this model")
            reason = self.accepts(linears[row.name], build("format", str(row.format)), row.activations)
            if reason is not None:
                raise ExportError(f"{row.name}: cannot store {row.format}: {reason}")
        check_fused(plan, linears.values())
        check_experts(plan, linears.values())
        check_zero_points(plan)

    def export(self, checkpoint: Checkpoint, plan: Plan, codes: Codes, folder: Path) -> Path:
        self.check_plan(checkpoint, plan)
        config = json.dumps(model_config(checkpoint, plan), indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(config, encoding="utf-8")
        for name, content in checkpoint.sidecars().items():
            (folder / name).write_bytes(content)
        write_shards(_tensors(checkpoint, plan, codes), folder, self.shard_bytes)
        return folder

    def _float_reason(self, format: Any, activations: int | None) -> str | None:
        if activations is not None:
            return "activations are rounded for integer weights only"
        if self._dtype in (None, format.dtype):
            return None
        return f"both engines load every float in the model's dtype: use float(dtype={self._dtype!r})"

    def _grid_reason(self, linear: Linear, format: Any) -> str | None:
        if not format.symmetric and format.zero != "integer":
            return f'compressed-tensors stores integer zero points: use zero="integer", not {format.zero!r}'
        if not format.symmetric and linear.rows % 32:
            return f"vLLM splits zero points every 32 outputs, and {linear.rows} do not: use symmetric=True"
        if isinstance(format.group, str) and format.group != "channel":
            return 'vLLM wants a scale for every output or group: use group="channel" or a number'
        if format.scale in ("e8m0", "double"):
            return f"scales are stored as floats of the model's dtype, not as {format.scale}"
        if isinstance(format.group, int) and linear.columns % format.group:
            fitting = [str(group) for group in GROUPS if linear.columns % group == 0]
            instead = f"groups of {', '.join(fitting)} do" if fitting else 'use group="channel"'
            return f"rows of {linear.columns} do not divide into groups of {format.group}; {instead}"
        if self._dtype is not None and format.scale not in ("auto", self._dtype):
            return f"both engines hold scales in the model's dtype, {self._dtype}, not in {format.scale}"
        return None


def _place_reason(linear: Linear, format: Any) -> str | None:
    """Weights that are not loaded quantized where they stand in the model."""
    if linear.role == "embedding":
        return (
            "quantized embeddings do not load: transformers fails on them, and vLLM reads them for few "
            "architectures, on GPUs only" + (" and never as the output head" if linear.tied else "")
        )
    if linear.role == "router":
        return "transformers and vLLM build routers in full precision"
    if linear.experts is not None:
        return "the experts are stored as one tensor; both engines load quantized experts one by one"
    if linear.transposed:
        return "the weight is stored transposed (Conv1D); both engines load quantized linear layers only"
    if linear.role.startswith("expert.") and not format.symmetric:
        return "transformers loads quantized experts without zero points: use symmetric=True"
    return None


def _activation_reason(linear: Linear, format: Any, activations: int | None) -> str | None:
    if activations is None:
        return None
    if activations != 8:
        return f"both engines round activations to 8 bits, not to {activations}"
    if linear.role.startswith("expert."):
        return "transformers loads quantized experts only if their activations are left alone"
    if format.bits < 8:
        return (
            f"vLLM multiplies packed {format.bits}-bit weights with 16-bit activations on x86 CPUs and most "
            "GPUs, whatever the folder asks for: leave the activations alone, or use int(bits=8, "
            "group='channel') with 8-bit activations"
        )
    if not format.symmetric or format.group != "channel":
        return "integer matrix products take int(bits=8, group='channel'), one symmetric scale an output"
    return None


def check_fused(plan: Plan, linears: Iterable[Linear]) -> None:
    """vLLM joins q, k, v and gate, up to one matrix each: their formats must be the same.

    Raises:
        ExportError: names the tensors that differ.
    """
    joined: dict[tuple[str, str], list[str]] = {}
    for linear in linears:
        if linear.role in FUSED:
            joined.setdefault((linear.input_group, FUSED[linear.role]), []).append(linear.name)
    for names in joined.values():
        _same(plan, names, "vLLM computes them as one matrix")


def check_experts(plan: Plan, linears: Iterable[Linear]) -> None:
    """Experts that are stored one by one have one format in the whole model.

    transformers merges them on loading, with one scheme for all of them and with none if the rest of the
    model alone is quantized; vLLM computes a layer's experts in one kernel.

    Raises:
        ExportError: names the tensors that differ.
    """
    experts = [linear for linear in linears if linear.role.startswith("expert.")]
    names = [linear.name for linear in experts if linear.experts is None]
    _same(plan, names, "the engines load all experts with one scheme")
    schemes = {row.name: scheme_of(row) for row in plan.rows}
    others = [name for name, scheme in schemes.items() if scheme and not scheme.expert]
    if names and others and schemes.get(names[0]) is None:
        raise ExportError(
            f"transformers loads {others[0]} quantized only if the experts are too, and the plan keeps "
            f"{names[0]}: give experts a symmetric int without activations, as int(bits=8, group=32)"
        )


def check_zero_points(plan: Plan) -> None:
    """transformers loads zero points by de-quantizing the model, with one scheme for all dense layers.

    Raises:
        ExportError: names two tensors that differ.
    """
    dense = {row.name: scheme for row in plan.rows if (scheme := scheme_of(row)) and not scheme.expert}
    if not all(scheme.symmetric for scheme in dense.values()):
        _same(plan, list(dense), "transformers loads asymmetric weights only if all layers are stored alike")


def _same(plan: Plan, names: Sequence[str], why: str) -> None:
    rows = {row.name: row for row in plan.rows if row.name in set(names)}
    first = {scheme_of(row): name for name, row in reversed(rows.items())}
    if len(first) < 2:
        return
    stored = "; ".join(f"{name} as {_spell(rows[name])}" for name in sorted(first.values()))
    raise ExportError(f"{why}, but the plan stores {stored}: give them the same format")


def model_config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The source's ``config.json`` with the dtype and quantization of the new folder."""
    config = {**checkpoint.config, "dtype": _name(checkpoint.dtype)}
    for stale in ("torch_dtype", "quantization_config"):
        config.pop(stale, None)
    if not config.get("architectures"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]  # vLLM goes by it
    quantization = quantization_config(plan)
    return config if quantization is None else {**config, "quantization_config": quantization}


def _tensors(checkpoint: Checkpoint, plan: Plan, codes: Codes) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder, one weight in memory at a time."""
    rows = {row.name: row for row in plan.quantized}
    floats = [row.name for row in plan.quantized if scheme_of(row) is None]
    linears = {linear.name: linear for linear in checkpoint.linears()} if floats else {}
    for name, info in checkpoint.tensors().items():
        if name not in rows:
            tensor = checkpoint.read(name)
            decoded = not isinstance(getattr(torch, info.stored, None), torch.dtype)
            yield name, tensor.to(checkpoint.dtype) if decoded and tensor.is_floating_point() else tensor
        elif scheme := scheme_of(rows[name]):
            for part, tensor in layer_tensors(codes(name), scheme).items():
                yield name.removesuffix("weight") + part, tensor
        else:
            yield name, _as_stored(codes(name).pack()["values"], linears[name])


def _as_stored(matrix: Tensor, linear: Linear) -> Tensor:
    """Inverse of ``Checkpoint.read_matrix``."""
    if linear.experts is not None:
        matrix = matrix.view(linear.experts, -1, linear.columns)
    return (matrix.transpose(-1, -2) if linear.transposed else matrix).contiguous()


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int) -> None:
    """``model.safetensors``, or numbered shards of at most ``limit`` bytes and their index.

    Names of shards tell how many there are, which is known last: they are renamed at the end.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0
    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > limit:
            shards.append(_write_shard(shard, folder / f"shard-{len(shards)}"))
            shard.clear()
        shard[name] = tensor
        total += tensor.nbytes
    shards.append(_write_shard(shard, folder / f"shard-{len(shards)}"))
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_shard(tensors: dict[str, Tensor], path: Path) -> list[str]:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read
    return list(tensors)


def _spell(row: PlanRow) -> str:
    if row.format is None:
        return "it is"
    return row.format if row.activations is None else f"{row.format} with {row.activations}-bit activations"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
