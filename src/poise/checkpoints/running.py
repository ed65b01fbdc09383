"""A model that runs elsewhere: nothing of it can be read, it can only be asked."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint, TensorInfo
from poise.core.errors import CheckpointError
from poise.core.linear import Linear
from poise.endpoints.client import Client


class Running(Checkpoint):
    """What is behind an endpoint. Its fingerprint is the address and the name: what is served there may change unseen."""

    kind: ClassVar[str] = "endpoint"

    def __init__(self, client: Client) -> None:
        self.client = client
        self.source, self.path = client.url, Path()
        self.config: dict[str, Any] = {}
        self.dtype = torch.float32

    def tensors(self) -> dict[str, TensorInfo]:
        return {}

    def read(self, name: str) -> Tensor:
        raise CheckpointError(f"{self.source}: the weights of a running endpoint cannot be read")

    def linears(self) -> list[Linear]:
        return []

    def fingerprint(self) -> str:
        return self.client.name

    def tokenizer(self) -> Any:
        raise CheckpointError(f"{self.source}: the tokenizer of a running endpoint cannot be read")

    def sidecars(self) -> dict[str, bytes]:
        return {}
