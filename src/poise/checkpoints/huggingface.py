"""Hugging Face folders: config.json beside one safetensors file or shards with an index.

Tensors are read one at a time by position, not mapped into memory, so that the resident set is what is
in use. The safetensors library validates every header first. Folders quantized with compressed-tensors
are decoded by that library: this is also how Poise reads back what it exported.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from poise.checkpoints.compressed import CompressedModules
from poise.checkpoints.linears import Skeleton, linears_of
from poise.core.checkpoint import Checkpoint, TensorInfo
from poise.core.errors import CheckpointError
from poise.core.linear import Linear

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SIDECARS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
SAMPLE = 1 << 16


class _Extent(NamedTuple):
    """Where a tensor's bytes are."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class HuggingFaceCheckpoint(Checkpoint):
    """A folder in the Hugging Face layout.

    Raises:
        CheckpointError: no configuration, no safetensors, pickled weights, a shard that is missing,
            truncated or outside the folder, a header that lies.
    """

    kind: ClassVar[str] = "huggingface"

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.source = source
        self.config = _read_json(path / "config.json")
        self._extents = {name: extent for file in self._files() for name, extent in _header(file).items()}
        self._check_index()
        quantization = self.config.get("quantization_config")
        method = (quantization or {}).get("quant_method")
        if quantization and method != "compressed-tensors":
            raise CheckpointError(f"{path}: already quantized with {method}; start from the original model")
        self._compressed = (
            CompressedModules(quantization, self._extents, self.skeleton) if quantization else None
        )
        self.dtype = self._main_dtype()

    @cached_property
    def skeleton(self) -> Skeleton:
        return Skeleton(self.config)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos = self._compressed.infos(self._raw) if self._compressed else {}
        inside = self._compressed.members if self._compressed else set()
        for name, extent in self._extents.items():
            if name not in inside:
                stored = str(extent.dtype).removeprefix("torch.")
                infos[name] = TensorInfo(shape=extent.shape, stored=stored, nbytes=extent.nbytes)
        if self.skeleton.tied and self.skeleton.head and self.skeleton.embedding in infos:
            infos.pop(self.skeleton.head, None)  # a copy of the embedding, which loaders ignore
        return infos

    def tensors(self) -> dict[str, TensorInfo]:
        return dict(self._infos)

    def read(self, name: str) -> Tensor:
        if self._compressed and name in self._compressed.modules:
            return self._compressed.decode(name, self._raw)
        return self._raw(name)

    def read_rows(self, linear: Linear, rows: slice) -> Tensor:
        """Reads no more than these rows, unless the file stores the matrix transposed."""
        if linear.transposed:
            return self.read_matrix(linear)[rows]
        start, stop, _ = rows.indices(linear.rows)
        if self._compressed and linear.name in self._compressed.modules:
            return self._compressed.decode(linear.name, self._raw, slice(start, stop))
        per_matrix = 1 if linear.experts is None else linear.rows // linear.experts
        if linear.experts is not None and (start % per_matrix or stop % per_matrix):
            return self.read_matrix(linear)[rows]
        found = self._raw(linear.name, slice(start // per_matrix, stop // per_matrix))
        return found.reshape(stop - start, linear.columns)

    def linears(self) -> list[Linear]:
        return linears_of(self.skeleton, {name: info.shape for name, info in self._infos.items()})

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({extent.file for extent in self._extents.values()}):
            digest.update(file.name.encode())
            for piece in _samples(file):
                digest.update(piece)
        return digest.hexdigest()

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: no usable tokenizer ({str(error).splitlines()[0]})"
            ) from error

    def activations(self) -> dict[str, int]:
        return self._compressed.activations() if self._compressed else {}

    def sidecars(self) -> dict[str, bytes]:
        return {name: (self.path / name).read_bytes() for name in SIDECARS if (self.path / name).is_file()}

    @cached_property
    def _index(self) -> dict[str, str] | None:
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            return None
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map")
        return weight_map

    def _files(self) -> list[Path]:
        if self._index is None:
            single = self.path / "model.safetensors"
            if single.is_file():
                return [single]
            pickles = sorted(
                file.name for p in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in self.path.glob(p)
            )
            if pickles:
                raise CheckpointError(
                    f"{self.path}: only pickled weights ({pickles[0]}). Loading a pickle runs code of whoever "
                    "made it, so Poise never does; convert it to safetensors first"
                )
            raise CheckpointError(f"{self.path}: no model.safetensors and no model.safetensors.index.json")
        for name in set(self._index.values()):
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or len(parts.parts) != 1:
                raise CheckpointError(
                    f"{self.path}: the index points outside the folder, to {name!r}; refused"
                )
            if not (self.path / name).is_file():
                raise CheckpointError(
                    f"{self.path}: the index names {name}, which is missing; download it again"
                )
        return [self.path / name for name in sorted(set(self._index.values()))]

    def _check_index(self) -> None:
        for name, file in (self._index or {}).items():
            extent = self._extents.get(name)
            if extent is None or extent.file.name != file:
                raise CheckpointError(f"{self.path / file}: lacks {name}, which the index places there")

    def _main_dtype(self) -> torch.dtype:
        """The floating type that holds most bytes; of a quantized folder what its configuration says."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if self._compressed and isinstance(named, str):
            dtype: torch.dtype = getattr(torch, named)
            return dtype
        totals: dict[torch.dtype, int] = {}
        for extent in self._extents.values():
            if extent.dtype.is_floating_point:
                totals[extent.dtype] = totals.get(extent.dtype, 0) + extent.nbytes
        if not totals:
            raise CheckpointError(f"{self.path}: holds no floating-point weights")
        return max(totals, key=lambda dtype: totals[dtype])

    def _raw(self, name: str, part: slice | None = None) -> Tensor:
        """A tensor, or the part of its first axis that is asked for, in memory of its own."""
        extent = self._extents[name]
        if part is not None:
            first, last, _ = part.indices(extent.shape[0])
            width = extent.nbytes // max(1, extent.shape[0])
            start, shape = extent.start + first * width, (last - first, *extent.shape[1:])
            extent = extent._replace(shape=shape, start=start, nbytes=(last - first) * width)
        buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
        with open(extent.file, "rb", buffering=0) as file:
            file.seek(extent.start)
            done = 0
            while done < extent.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{extent.file}: ends inside {name}; the file is truncated")
                done += count
        return (
            buffer.view(extent.dtype).view(extent.shape)
            if extent.nbytes
            else torch.empty(extent.shape, dtype=extent.dtype)
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: has no {path.name}; is it a model folder?") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds {type(data).__name__}, expected an object")
    return data


def _header(path: Path) -> dict[str, _Extent]:
    """Extents of a file whose header the safetensors library has found consistent."""
    try:
        with safe_open(path, "pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file ({error})") from error
    header.pop("__metadata__", None)
    extents = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {entry['dtype']}, which Poise does not read")
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        extents[name] = _Extent(path, DTYPES[entry["dtype"]], shape, 8 + length + start, end - start)
    return extents


def _samples(path: Path) -> Iterator[bytes]:
    """Size, header and three samples of a file."""
    size = path.stat().st_size
    yield str(size).encode()
    with open(path, "rb") as file:
        yield file.read(8 + int.from_bytes(file.read(8), "little"))
        for start in (size // 4, size // 2, max(0, size - SAMPLE)):
            file.seek(start)
            yield file.read(SAMPLE)
