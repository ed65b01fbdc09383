"""The contract of an exporter: bytes that another runtime reads."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.format import Format, QTensor
from poise.core.linear import Linear
from poise.core.plan import Plan

Codes = Callable[[str], QTensor]
"""Loads the quantized weight of a tensor by name; each call reads it from disk."""


class Exporter(ABC):
    """Writes a model in a container. What it cannot hold it says before anything is written."""

    engines: ClassVar[tuple[str, ...]] = ()
    """Names of the runtimes that load the result, for people."""

    @abstractmethod
    def check(self, checkpoint: Checkpoint) -> None:
        """Raises ``ExportError`` when the container cannot hold this architecture at all."""

    @abstractmethod
    def scale_dtype(self, checkpoint: Checkpoint) -> str:
        """The dtype that formats with ``scale="auto"`` take in this container."""

    @abstractmethod
    def accepts(self, linear: Linear, format: Format, activations: int | None) -> str | None:
        """None when the container stores this exactly, else the reason why not."""

    def check_plan(self, checkpoint: Checkpoint, plan: Plan) -> None:  # noqa: B027  # most have nothing to add
        """Raises ``ExportError`` when matrices that the runtime fuses are planned apart."""

    def kept(self, checkpoint: Checkpoint, name: str, value: Tensor) -> Tensor:
        """A kept tensor as it reads back; another only where the container stores a function of it."""
        return value

    @abstractmethod
    def export(self, checkpoint: Checkpoint, plan: Plan, codes: Codes, folder: Path) -> Path:
        """Writes the model into an empty folder and returns what an engine is pointed at.

        Memory stays bounded by the largest tensor and one output shard. The bytes depend on the
        inputs alone. Kept matrices and all other tensors are carried over from the checkpoint.
        """
