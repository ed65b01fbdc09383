"""A row of tensors of which only as many are in memory as a budget allows; the others wait on disk."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEMORY = 1 << 28
"""Bytes that one spool keeps in memory."""


class Spool:
    """Tensors of float32 by number.

    Args:
        folder: where those go that are over the budget; made when it is needed.
        budget: bytes that stay in memory.
    """

    def __init__(self, folder: Path, budget: int = MEMORY) -> None:
        self.folder = folder
        self._left = budget
        self._kept: dict[int, Tensor] = {}
        self._shapes: dict[int, torch.Size] = {}

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def append(self, value: Tensor) -> None:
        self[len(self)] = value

    def __setitem__(self, number: int, value: Tensor) -> None:
        size = value.numel() * value.element_size()
        before = self._kept.get(number)
        room = self._left + (0 if before is None else before.numel() * before.element_size())
        self._shapes[number] = value.shape
        if size <= room:
            self._kept[number] = value
            self._left = room - size
            return
        self._left = room
        self._kept.pop(number, None)
        self.folder.mkdir(parents=True, exist_ok=True)
        value.contiguous().numpy().tofile(self._file(number))

    def __getitem__(self, number: int) -> Tensor:
        if number in self._kept:
            return self._kept[number]
        flat = torch.from_numpy(np.fromfile(self._file(number), dtype=np.float32))
        return flat.view(self._shapes[number])

    def close(self) -> None:
        """Forgets everything and frees the disk."""
        self._kept.clear()
        self._shapes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.f32"
