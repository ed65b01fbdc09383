"""The contract of a source model: read lazily, one tensor at a time."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.linear import Linear


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor as the file stores it.

    Attributes:
        shape: logical shape (of the decoded tensor, for quantized storage).
        stored: name of the storage type: ``bfloat16``, ``Q4_1``, ``pack-quantized int4``.
        nbytes: bytes in the file, all metadata of this tensor included.
    """

    shape: tuple[int, ...]
    stored: str
    nbytes: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class Checkpoint(ABC):
    """A model on disk, under the names of its Hugging Face layout.

    Attributes:
        source: what the user asked for (a path, a hub id).
        path: the folder or file it was found at.
        config: the model's ``config.json`` (rebuilt from metadata for GGUF).
        dtype: the floating type of its weights: what a kept tensor is stored in.
        kind: layout on disk, ``huggingface`` or ``gguf``.
    """

    kind: ClassVar[str]
    source: str
    path: Path
    config: dict[str, Any]
    dtype: torch.dtype

    @abstractmethod
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the model by its Hugging Face name."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, decoded if it is stored quantized, in the shape of ``tensors()``.

        Raises:
            CheckpointError: the bytes are not what the header promised.
        """

    @abstractmethod
    def linears(self) -> list[Linear]:
        """The matrices that a plan may quantize, in the order of the model."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the files' sizes, headers and samples: cheap, and different for different models, but not
        proof against a single changed weight."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer (a ``transformers`` tokenizer).

        Raises:
            CheckpointError: there is none.
        """

    @abstractmethod
    def sidecars(self) -> dict[str, bytes]:
        """Tokenizer, chat template and generation settings as files of the Hugging Face layout."""

    def activations(self) -> dict[str, int]:
        """Modules whose inputs are rounded at run time, and to how many bits."""
        return {}

    @property
    def context(self) -> int | None:
        """Longest text the model was made for, in tokens; None if the configuration does not say."""
        names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
        known = [self.config[name] for name in names if isinstance(self.config.get(name), int)]
        return min(known, default=None)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(info.nbytes for info in self.tensors().values())

    def read_matrix(self, linear: Linear) -> Tensor:
        """A linear's weight as [rows, columns]: transposed storage undone, experts stacked."""
        weight = self.read(linear.name)
        if linear.transposed:
            weight = weight.transpose(-1, -2)
        return weight.reshape(linear.rows, linear.columns)

    def read_rows(self, linear: Linear, rows: slice) -> Tensor:
        """Some rows of ``read_matrix``; layouts that can, read no more than these."""
        return self.read_matrix(linear)[rows]
