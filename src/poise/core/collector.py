"""The contract of a collector: activations in, window by window; one statistic out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from poise.core.errors import PoiseError


@dataclass(kw_only=True, eq=False)
class Collector(ABC):
    """Learns one thing about a stream of activations. The fields are its options, all else is its state.

    How the stream is cut into calls and in which order it comes changes a result by rounding errors only.

    Attributes:
        columns: inputs of the layer.
        name: of the layer or input group, for messages.
    """

    reads: ClassVar[tuple[str, ...]] = ("x",)
    """What ``add`` is called with, in order: ``x`` the inputs of the layer, ``original`` those that it has in the
    original model, ``gradient`` that of the loss by its outputs."""

    columns: int
    name: str = "the layer"

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError(f"{self.name}: a collector of {self.columns} columns has nothing to read")
        self.n_tokens = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each tensor of ``reads``."""
        return (self.columns,) * len(self.reads)

    def add(self, *tensors: Tensor) -> None:
        """Takes in some tokens, perhaps none.

        Args:
            tensors: one for each name in ``reads``, [tokens, its columns], of any floating dtype; not kept.

        Raises:
            PoiseError: a tensor has another shape, or holds NaN or infinity; the message names the layer.
        """
        if len(tensors) != len(self.reads):
            raise PoiseError(f"{self.name}: wants {', '.join(self.reads)}, got {len(tensors)} tensors")
        wanted = [(len(tensors[0]), width) for width in self.widths]
        for what, tensor, shape in zip(self.reads, tensors, wanted, strict=True):
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                came = f"{tensor.dtype} {list(tensor.shape)}"
                raise PoiseError(f"{self.name}: {what} must be floating {list(shape)}, got {came}")
            self._check_finite(what, tensor)
        if wanted[0][0]:
            self._add(*(tensor.detach() for tensor in tensors))
            self.n_tokens += wanted[0][0]

    def _check_finite(self, what: str, tensor: Tensor) -> None:
        if bool(torch.isfinite(tensor.sum())):  # one pass, no temporary; a sum may overflow all the same
            return
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            token, column = bad.nonzero()[0].tolist()
            raise PoiseError(
                f"{self.name}: {what} is not finite on the calibration text: {int(bad.sum())} of {tensor.numel()} "
                f"values, the first at token {self.n_tokens + token}, column {column}; is the model sound?"
            )

    def merge(self, other: Self) -> None:
        """Takes in all that another collector has seen, which stays as it is.

        Raises:
            PoiseError: the other is of another kind or has other options.
        """
        fields = [name for name in self.__dataclass_fields__ if name != "name"]
        if type(other) is not type(self) or any(getattr(self, key) != getattr(other, key) for key in fields):
            raise PoiseError(
                f"{self.name}: cannot be merged with {other.name}, whose collector is another one"
            )
        self._merge(other)
        self.n_tokens += other.n_tokens

    def result(self) -> dict[str, Tensor]:
        """The statistic, as float32 tensors under the names that ``Stats`` has for them where it has any.

        Raises:
            PoiseError: no token was seen, or sums have left the range of float32.
        """
        if not self.n_tokens:
            raise PoiseError(f"{self.name}: no token of the calibration text has come here; give more text")
        found = {key: value.float() for key, value in self._result().items()}
        for key, value in found.items():
            if not bool(torch.isfinite(value).all()):
                raise PoiseError(f"{self.name}: its {key} is beyond float32; are the activations sound?")
        return found

    @abstractmethod
    def _add(self, *tensors: Tensor) -> None:
        """Takes in at least one token; shapes and values are checked."""

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Takes in the state of an equal collector."""

    @abstractmethod
    def _result(self) -> dict[str, Tensor]:
        """The statistic of at least one token."""
