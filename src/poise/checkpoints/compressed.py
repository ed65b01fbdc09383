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

    def decode(self, name: str, read: Callable[[str], Tensor], rows: slice | None = None) -> Tensor:
        """A weight, or some of its rows, as the library decodes it, in the dtype of its scales."""
        from compressed_tensors.compressors import BaseCompressor

        scheme = self._scheme(name)
        compressor = BaseCompressor.get_value_from_registry(self._format(scheme))
        stored = {part.rpartition(".")[2]: read(part) for part in self.modules[name]}
        wanted = slice(None)
        if rows is not None:
            stored, wanted = _some_rows(stored, scheme.weights.num_bits, rows)
        weight: Tensor = compressor.decompress(stored, scheme)["weight"]
        return weight[wanted]

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


def _some_rows(stored: Mapping[str, Tensor], bits: int, rows: slice) -> tuple[dict[str, Tensor], slice]:
    """The tensors of a layer cut to some outputs, so that a large one is decoded slab by slab.

    Packed zero points run down the outputs, and 32 of them fill whole words: the cut is made there.

    Returns:
        The cut, and where in it the rows are that were asked for.
    """
    start, stop, _ = rows.indices(len(stored["weight_scale"]))
    first, last = start // 32 * 32, min(-(-stop // 32) * 32, len(stored["weight_scale"]))
    cut = {key: value[first:last] for key, value in stored.items()}
    if "weight_shape" in stored:
        cut["weight_shape"] = torch.tensor([last - first, int(stored["weight_shape"][1])])
    if "weight_zero_point" in stored and stored["weight_zero_point"].dtype == torch.int32:
        cut["weight_zero_point"] = stored["weight_zero_point"][first * bits // 32 : -(-last * bits // 32)]
    return cut, slice(start - first, stop - first)
