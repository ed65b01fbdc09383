"""GGUF files as source models, under the names and in the orientation of the Hugging Face layout.

Tensors are read one at a time by position and decoded by the ``gguf`` package. What llama.cpp stores
rearranged is put back, so the rest of Poise never sees the difference.
"""

import hashlib
import json
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint, TensorInfo
from poise.core.errors import CheckpointError, ExportError
from poise.core.linear import Linear
from poise.layouts.gguf import EXTRAS, Slot, expert_names, slots
from poise.layouts.gguf_blocks import known, unpack
from poise.layouts.gguf_header import Entry, Value, read_header
from poise.layouts.gguf_metadata import complete, read_config
from poise.layouts.gguf_tokenizer_read import read_tokenizer

SAMPLE = 1 << 16
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Source(NamedTuple):
    """One Hugging Face tensor: its slot and its place among the experts stacked there."""

    slot: Slot
    number: int


class GgufCheckpoint(Checkpoint):
    """A model in a GGUF file.

    Attributes:
        gguf_metadata: every key of the file, so that an export to GGUF carries them over unchanged.

    Raises:
        CheckpointError: no GGUF file, a damaged or hostile one, one part of several, an architecture
            or a block type that Poise does not read, tensors that are missing or in excess.
    """

    kind: ClassVar[str] = "gguf"

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.source = source
        self._header = read_header(path)
        self.gguf_metadata: dict[str, Value] = self._header.metadata
        try:
            self._refuse_unreadable()
            self.config = read_config(self._header, lambda name: self._decode(self._header.tensors[name]))
            self.dtype = self._main_dtype()
            self.config["dtype"] = str(self.dtype).removeprefix("torch.")
        except (CheckpointError, TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    @property
    def gguf_constants(self) -> dict[str, Tensor]:
        """Tensors of the file that are no weights of the Hugging Face model."""
        present = [name for name in EXTRAS if name in self._header.tensors]
        return {name: self._decode(self._header.tensors[name]) for name in present}

    def tensors(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, (slot, _) in self._sources.items():
            entry = self._header.tensors[slot.name]
            shape = slot.shape[::-1] if slot.transposed else slot.shape
            infos[name] = TensorInfo(shape=shape, stored=entry.type, nbytes=entry.nbytes // len(slot.sources))
        return infos

    def read(self, name: str) -> Tensor:
        """Float tensors come as they are stored, quantized ones as float32."""
        slot, number = self._sources[name]
        entry = self._header.tensors[slot.name]
        share = entry.nbytes // len(slot.sources)
        part = Entry(entry.type, slot.shape, entry.start + number * share, share)
        return slot.from_gguf(self._decode(part))

    def read_rows(self, linear: Linear, rows: slice) -> Tensor:
        """Reads and decodes the span of the file that holds these rows, and no more."""
        slot, number = self._sources[linear.name]
        entry = self._header.tensors[slot.name]
        order = slot.row_order()
        places = torch.arange(slot.rows)[rows] if order is None else torch.argsort(order)[rows]
        first, last = int(places.min()), int(places.max())
        share = entry.nbytes // len(slot.sources)
        row = share // slot.rows
        start = entry.start + number * share + first * row
        shape = (last - first + 1, *slot.shape[1:])
        return self._decode(Entry(entry.type, shape, start, shape[0] * row))[places - first]

    def linears(self) -> list[Linear]:
        from poise.checkpoints.linears import find_linears

        return find_linears(self.config, {name: info.shape for name, info in self.tensors().items()})

    def fingerprint(self) -> str:
        size = self.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(self.path, "rb") as file:
            digest.update(file.read(self._header.length))
            for start in (self._header.length, size // 2, max(0, size - SAMPLE)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
        return digest.hexdigest()

    def tokenizer(self) -> Any:
        try:
            return read_tokenizer(lambda key: self._header.get(f"tokenizer.{key}"))
        except Exception as error:  # the tokenizers library raises whatever a bad vocabulary leads to
            raise CheckpointError(
                f"{self.path}: no usable tokenizer: {str(error).splitlines()[0]}"
            ) from error

    def sidecars(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer().save_pretrained(folder)
            files = {
                file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()
            }
        ends = [self._header.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        known = [end for end in dict.fromkeys(ends) if end is not None]
        generation = {
            "bos_token_id": self.config["bos_token_id"],
            "eos_token_id": known if len(known) > 1 else (known or [None])[0],
            "pad_token_id": self.config["pad_token_id"],
        }
        present = {key: value for key, value in generation.items() if value is not None}
        return files | {"generation_config.json": json.dumps(present, indent=1).encode()}

    @cached_property
    def _sources(self) -> dict[str, _Source]:
        """Every Hugging Face tensor; the file must hold exactly these."""
        from poise.checkpoints.linears import Skeleton

        skeleton = Skeleton(self.config)
        try:
            found = slots(complete(self.config), self._shapes(skeleton.parameters))
        except ExportError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        wanted = {slot.name for slot in found}
        present = set(self._header.tensors) - set(EXTRAS)
        if wanted != present:
            raise CheckpointError(
                f"{self.path}: not the tensors of {self.config['model_type']}: "
                f"missing {sorted(wanted - present)[:3]}, unknown {sorted(present - wanted)[:3]}"
            )
        for slot in found:
            shape = (len(slot.sources), *slot.shape) if slot.stacked else slot.shape
            if self._header.tensors[slot.name].shape != shape:
                raise CheckpointError(
                    f"{self.path}: {slot.name} has shape {list(self._header.tensors[slot.name].shape)}, "
                    f"the metadata asks for {list(shape)}"
                )
        return {name: _Source(slot, number) for slot in found for number, name in enumerate(slot.sources)}

    def _shapes(self, parameters: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Names and shapes as folders on the hub have them: no tied head, one tensor an expert."""
        kind = self.config["model_type"]
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in parameters.items():
            block = name.split(".")[2] if name.startswith("model.layers.") else ""
            if name == "lm_head.weight" and self.config["tie_word_embeddings"]:
                continue
            if len(shape) == 3:
                parts = ("down",) if name.endswith("down_proj") else ("gate", "up")
                rows = shape[1] // len(parts)
                for part in parts:
                    shapes |= dict.fromkeys(expert_names(kind, int(block), part, shape[0]), (rows, shape[2]))
            elif kind == "mixtral" and name.endswith(".mlp.gate.weight"):
                shapes[name.replace(".mlp.", ".block_sparse_moe.")] = shape
            else:
                shapes[name] = shape
        return shapes

    def _refuse_unreadable(self) -> None:
        if self._header.get("split.count", 1) > 1:
            raise CheckpointError(
                "one part of a split model; join the parts with llama-gguf-split --merge first"
            )
        if not self._header.tensors:
            raise CheckpointError("holds no tensors")
        for kind in sorted({entry.type for entry in self._header.tensors.values()}):
            if not _decodable(kind):
                raise CheckpointError(f"holds {kind} blocks, which nothing here decodes")

    def _main_dtype(self) -> torch.dtype:
        """Float type of most bytes in matrices; bfloat16 where most are quantized: what models are trained in."""
        totals: dict[str, int] = {}
        for entry in self._header.tensors.values():
            if len(entry.shape) > 1:
                totals[entry.type] = totals.get(entry.type, 0) + entry.nbytes
        return DTYPES.get(max(totals, key=lambda kind: totals[kind]), torch.bfloat16)

    def _decode(self, entry: Entry) -> Tensor:
        """A tensor of the file, in memory of its own."""
        raw = self._bytes(entry)
        if entry.type in DTYPES:
            return raw.view(DTYPES[entry.type]).view(entry.shape)
        packed = raw.numpy().reshape(int(np.prod(entry.shape[:-1])), -1)
        if not _in_package(entry.type):
            return unpack(torch.from_numpy(packed), entry.type, entry.shape[-1]).view(entry.shape)
        values = gguf.dequantize(packed, gguf.GGMLQuantizationType[entry.type])
        return torch.from_numpy(np.ascontiguousarray(values)).view(entry.shape)

    def _bytes(self, entry: Entry) -> Tensor:
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        view = buffer.numpy().data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < entry.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.path}: ends inside a tensor; the file is truncated")
                done += count
        return buffer


def _decodable(kind: str) -> bool:
    return _in_package(kind) or known(kind)


def _in_package(kind: str) -> bool:
    """Whether the gguf package decodes these blocks."""
    try:
        number = gguf.GGMLQuantizationType[kind]
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), dtype=np.uint8), number)
    except (KeyError, NotImplementedError):
        return False
    return True
