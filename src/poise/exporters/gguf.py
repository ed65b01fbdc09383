"""GGUF, the container of llama.cpp: one file with weights, hyper-parameters and tokenizer.

Everything that could fail is decided before the file is opened: where each tensor goes, which block type
holds it, how long it is. Then the header is written, and the tensors follow one at a time.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.errors import ExportError
from poise.core.exporter import Codes, Exporter
from poise.core.format import Format
from poise.core.linear import Linear
from poise.core.plan import Plan
from poise.core.registry import build, spec_of
from poise.core.slabs import WEIGHTS
from poise.layouts.gguf import Slot, architecture, slots
from poise.layouts.gguf_blocks import FLOATS, Rows, block_of, pack, pack_floats
from poise.layouts.gguf_header import ARRAY, Value, text, type_number, type_size, u32
from poise.layouts.gguf_metadata import complete, hyper_parameters
from poise.layouts.gguf_rope import rope_tensors
from poise.layouts.gguf_tokenizer import fits_name, tokenizer_keys

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14,
    "Q5_K": 16, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26,
    "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40,
    "Q2_0": 41,
}  # fmt: skip
"""Block type of most weights -> llama.cpp's number for "mostly that"."""
QUANTIZATION_VERSION = 2
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
REWRITTEN = re.compile(r"general\.(architecture|file_type|quantization_version|alignment)|split\..*")
"""Keys of a GGUF source that describe the file they come from."""

Formats = Mapping[str, str | None]
"""Tensor name -> spec of its format; None and names that are missing are kept."""


class _Tensor(NamedTuple):
    """One tensor to write: its block type, and the slot it is made from (None for a constant)."""

    name: str
    type: str
    shape: tuple[int, ...]
    slot: Slot | None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        block, nbytes = type_size(self.type)
        return (*self.shape[:-1], self.shape[-1] // block * nbytes)


class Gguf(Exporter):
    """Writes ``model.gguf``."""

    engines = ("llama.cpp",)

    def check(self, checkpoint: Checkpoint) -> None:
        _metadata(checkpoint)
        _slots(checkpoint)

    def scale_dtype(self, checkpoint: Checkpoint) -> str:
        return "float16"

    def accepts(self, linear: Linear, format: Format, activations: int | None) -> str | None:
        if activations is not None:
            return "llama.cpp rounds activations itself"
        block = block_of(format)
        if block is None:
            return f"llama.cpp has no block for {spec_of(format)}"
        if linear.role == "router" and block != "F32":
            return "llama.cpp keeps routers in float32"
        size = type_size(block)[0]
        if linear.columns % size:
            return f"rows of {linear.columns} are not a multiple of the block of {size}"
        return None

    def kept(self, checkpoint: Checkpoint, name: str, value: Tensor) -> Tensor:
        """Gemma's norms are stored with one added, in float32."""
        slot = next(slot for slot in _slots(checkpoint) if name in slot.sources)
        return slot.from_gguf(slot.to_gguf(value)) if slot.shift else value

    def export(self, checkpoint: Checkpoint, plan: Plan, codes: Codes, folder: Path) -> Path:
        metadata = _metadata(checkpoint)
        constants = _constants(checkpoint)
        formats = {row.name: row.format for row in plan.rows}
        tensors = [_Tensor(name, "F32", tuple(value.shape), None) for name, value in constants.items()]
        tensors += [_tensor(slot, formats, checkpoint) for slot in _slots(checkpoint)]
        metadata |= _file_keys(tensors)
        path = folder / "model.gguf"
        with _writer(path, architecture(checkpoint.config), metadata, tensors) as writer:
            for tensor in tensors:
                parts = (
                    [pack_floats(constants[tensor.name].view(1, -1))]
                    if tensor.slot is None
                    else _parts(tensor, tensor.slot, checkpoint, formats, codes)
                )
                writer.write_tensor_data(_joined(tensor, parts))
        return path


def _slots(checkpoint: Checkpoint) -> list[Slot]:
    shapes = {name: info.shape for name, info in checkpoint.tensors().items()}
    return slots(complete(checkpoint.config), shapes)


def _metadata(checkpoint: Checkpoint) -> dict[str, Value]:
    """All keys but those about the file itself; of a GGUF source its own, unchanged."""
    own: dict[str, Value] | None = getattr(checkpoint, "gguf_metadata", None)
    if own is not None:
        return {key: value for key, value in own.items() if not REWRITTEN.fullmatch(key)}
    config = complete(checkpoint.config)
    keys = hyper_parameters(config)
    rows = int(config["vocab_size"])
    generation = json.loads(checkpoint.sidecars().get("generation_config.json", b"{}"))
    words = tokenizer_keys(checkpoint.tokenizer(), rows, generation)
    general = {"general.type": text("model")}
    name = Path(checkpoint.source.partition("@")[0]).name
    if name and fits_name(name, words["tokenizer.ggml.tokens"].value):
        general["general.name"] = text(name)
    return general | keys | words


def _constants(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors that are no weights of the Hugging Face model, float32."""
    own: dict[str, Tensor] | None = getattr(checkpoint, "gguf_constants", None)
    return rope_tensors(complete(checkpoint.config)) if own is None else own


def _tensor(slot: Slot, formats: Formats, checkpoint: Checkpoint) -> _Tensor:
    """Decides the block type of a slot.

    Raises:
        ExportError: experts of one stack have different formats, or a format that no block holds.
    """
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    kept = "F32" if slot.always_float32 else FLOATS.get(dtype, "F32")
    planned = {name: formats.get(name) for name in slot.sources}
    if len(set(planned.values())) > 1:
        examples = {spec: name for name, spec in reversed(planned.items())}
        raise ExportError(
            f"{slot.name} holds the experts of a block in one format, the plan has several: "
            + ", ".join(f"{spec or 'kept'} for {name}" for spec, name in examples.items())
        )
    spec = planned[slot.sources[0]]
    block = kept if spec is None else block_of(build("format", spec))
    if block is None or slot.shape[-1] % type_size(block)[0]:
        raise ExportError(f"{slot.name}: llama.cpp has no block for {spec} in rows of {slot.shape[-1]}")
    if slot.always_float32 and block != "F32":
        raise ExportError(f"{slot.name}: llama.cpp keeps it in float32, the plan asks for {spec}")
    shape = (len(slot.sources), *slot.shape) if slot.stacked else slot.shape
    return _Tensor(slot.name, block, shape, slot)


def _file_keys(tensors: list[_Tensor]) -> dict[str, Value]:
    weights: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            weights[tensor.type] = weights.get(tensor.type, 0) + int(np.prod(tensor.shape))
    mostly = max(weights, key=lambda block: weights[block])
    keys = {"general.file_type": u32(FILE_TYPES[mostly])}
    if set(weights) - set(DTYPES):
        keys["general.quantization_version"] = u32(QUANTIZATION_VERSION)
    return keys


def _parts(
    tensor: _Tensor, slot: Slot, checkpoint: Checkpoint, formats: Formats, codes: Codes
) -> Iterator[Rows]:
    """Packed rows of each source, in llama.cpp's order of rows."""
    for name in slot.sources:
        if formats.get(name) is None:
            yield _kept(tensor, slot, checkpoint.read(name))
            continue
        qtensor = codes(name)
        if qtensor.shape != slot.shape or block_of(qtensor.format) != tensor.type:
            raise ExportError(
                f"{name}: the plan promises {tensor.type} {list(slot.shape)}, "
                f"the codes are {spec_of(qtensor.format)} {list(qtensor.shape)}"
            )
        order = slot.row_order()
        for start in range(0, slot.rows, step := max(1, WEIGHTS // slot.shape[-1])):
            rows = slice(start, start + step)
            yield pack(qtensor[rows if order is None else order[rows]])


def _kept(tensor: _Tensor, slot: Slot, value: Tensor) -> Rows:
    cast = slot.to_gguf(value).to(DTYPES[tensor.type])
    if bool(torch.isinf(cast).any()) and not bool(torch.isinf(value).any()):
        largest = float(value.abs().max())
        raise ExportError(f"{slot.name} holds values up to {largest:.3g}, more than {tensor.type} can")
    return pack_floats(cast.reshape(slot.rows, -1))


def _joined(tensor: _Tensor, parts: Iterable[Rows]) -> Rows:
    """Fills one array of the tensor's size, so that a stack of experts is never in memory twice."""
    whole = np.empty(tensor.byte_shape, dtype=np.uint8)
    flat = whole.reshape(-1)
    start = 0
    for part in parts:
        flat[start : start + part.size] = part.reshape(-1)
        start += part.size
    if start != flat.size:
        raise ExportError(f"{tensor.name}: {start} bytes came, its header promises {flat.size}")
    return whole


@contextmanager
def _writer(path: Path, arch: str, metadata: dict[str, Value], tensors: list[_Tensor]) -> Iterator[Any]:
    """A ``GGUFWriter`` whose header is written and that waits for the data of these tensors in turn."""
    writer = gguf.GGUFWriter(path, arch)
    for key, (kind, items, value) in metadata.items():
        if kind != ARRAY or value:  # an empty array has no place in the writer and no meaning to llama.cpp
            items = None if items is None else gguf.GGUFValueType(items)
            writer.add_key_value(key, _raw(value), gguf.GGUFValueType(kind), items)
    for tensor in tensors:
        nbytes = int(np.prod(tensor.byte_shape))
        # Any dtype but uint8, whose shape would be taken for one of bytes: the writer knows fewer types than we do.
        block: Any = type_number(tensor.type)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.int8), nbytes, block)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        yield writer
    finally:
        writer.close()


def _raw(value: Any) -> Any:
    """Strings as the bytes they were read from."""
    if isinstance(value, list):
        return [_raw(item) for item in value]
    return value.encode("utf-8", errors="surrogateescape") if isinstance(value, str) else value
