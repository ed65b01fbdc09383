"""Weights stored by compressed-tensors, decoded by that library's own decompressors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from poise.checkpoints.linears import Skeleton
from poise.core.checkpoint import TensorInfo
from poise.core.errors import CheckpointError

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight")


class CompressedModules:
    """The quantized modules of a folder.

    Args:
        config: the ``quantization_config`` of its ``config.json``.
        extents: every stored tensor by name, with ``nbytes`` and ``shape``.
        skeleton: the architecture, to match the modules that a config group targets.
    """

    def __init__(self, config: Mapping[str, Any], extents: Mapping[str, Any], skeleton: Skeleton) -> None:
        from compressed_tensors.quantization import QuantizationConfig

        values = {key: value for key, value in config.items() if key != "quant_method"}
        try:
            self._config = QuantizationConfig.model_validate(values)
        except ValueError as error:
            raise CheckpointError(f"config.json: quantization_config is not understood ({error})") from error
        self._extents = extents
        self._skeleton = skeleton
        names = {name.removesuffix("_scale") for name in extents if name.endswith(".weight_scale")}
        self.modules: dict[str, list[str]] = {
            name: [part for key in PARTS if (part := name.removesuffix("weight") + key) in extents]
            for name in sorted(names)
        }
        self.members: set[str] = {part for parts in self.modules.values() for part in parts}

    def infos(self, read: Callable[[str], Tensor]) -> dict[str, TensorInfo]:
        """Logical shapes and stored bytes of the quantized weights."""
        infos = {}
        for name, parts in self.modules.items():
            scheme = self._scheme(name)
            shape_name = f"{name}_shape"
            shape = read(shape_name).tolist() if shape_name in parts else self._extents[name].shape
            stored = f"{self._format(scheme)} {scheme.weights.type}{scheme.weights.num_bits}"
            nbytes = sum(self._extents[part].nbytes for part in parts)
            infos[name] = TensorInfo(shape=tuple(int(n) for n in shape), stored=stored, nbytes=nbytes)
        return infos

    def decode(self, name: str, read: Callable[..., Tensor], rows: slice | None = None) -> Tensor:
        """A weight, or some of its rows, as the library decodes it, in the dtype of its scales.

        Args:
            read: reads a stored tensor, or a slice of its first axis if one is given.
        """
        from compressed_tensors.compressors import BaseCompressor

        scheme = self._scheme(name)
        compressor = BaseCompressor.get_value_from_registry(self._format(scheme))
        stored = {}
        start, stop, _ = (rows or slice(None)).indices(self._extents[f"{name}_scale"].shape[0])
        first, last = _whole_words(start, stop)
        for part in self.modules[name]:
            key, packed = part.rpartition(".")[2], self._extents[part].dtype == torch.int32
            if key == "weight_shape":
                shape = read(part)
                stored[key] = torch.stack((shape.new_tensor(min(last, int(shape[0])) - first), shape[1]))
            elif key == "weight_zero_point" and packed:
                bits = scheme.weights.num_bits
                stored[key] = read(part, slice(first * bits // 32, -(-last * bits // 32)))
            else:
                stored[key] = read(part, slice(first, last))
        weight: Tensor = compressor.decompress(stored, scheme)["weight"]
        return weight[start - first : stop - first]

    def activations(self) -> dict[str, int]:
        """Modules whose inputs are rounded at run time, and to how many bits."""
        inputs = {name: self._scheme(name).input_activations for name in self.modules}
        return {
            self._skeleton.place(name).parameter.rpartition(".")[0]: int(arguments.num_bits)
            for name, arguments in inputs.items()
            if arguments is not None
        }

    def _format(self, scheme: Any) -> str:
        return str(getattr(scheme.format, "value", scheme.format) or self._config.format)

    def _scheme(self, name: str) -> Any:
        from compressed_tensors.utils.match import is_match

        path = name.rpartition(".")[0]
        module = self._skeleton.module_of(self._skeleton.place(name).parameter)
        module = module or torch.nn.Linear(1, 1, device="meta")
        ignore: Iterable[str] = self._config.ignore or ()
        for scheme in self._config.config_groups.values():
            if is_match(path, module, scheme.targets, ignore):
                return scheme
        raise CheckpointError(f"{name}: stored quantized, but no config group of config.json targets it")


def _whole_words(start: int, stop: int) -> tuple[int, int]:
    """Widens a span of rows to multiples of 32: packed zero points run down the rows, and 32 of them fill
    whole words whatever their bits."""
    return start // 32 * 32, -(-stop // 32) * 32
