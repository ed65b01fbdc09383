"""How compressed-tensors stores a quantized layer, and how ``config.json`` describes it.

A quantized layer ``m`` is a few tensors side by side. ``pack-quantized`` holds ``m.weight_packed`` (codes,
int32 words along the inputs), ``m.weight_scale`` [out, groups], ``m.weight_shape`` and, for asymmetric
grids, ``m.weight_zero_point`` (words along the outputs). ``int-quantized`` holds ``m.weight`` as int8 and
``m.weight_scale`` [out, 1]: what integer matrix products read. The ``quantization_config`` has one *config
group* for each distinct scheme, with the layers it targets.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.core.format import QTensor
from poise.core.plan import Plan, PlanRow
from poise.core.registry import build, name_of

LAYOUT_VERSION = "0.20.0"
"""The release of compressed-tensors whose layout this is: codes of 3, 5, 6 and 7 bits straddle words."""


@dataclass(frozen=True, kw_only=True, order=True)
class Scheme:
    """How a layer is stored and computed: one config group.

    Attributes:
        layout: ``pack-quantized`` or ``int-quantized``.
        bits: of a weight.
        group: inputs that share a scale; 0 for one scale an output.
        symmetric: whether there are no zero points.
        activations: bits of the dynamic per-token activations; 0 when they are left alone.
        expert: transformers finds the scheme of experts by a group of their own.
    """

    layout: str
    bits: int
    group: int
    symmetric: bool
    activations: int
    expert: bool

    def config(self, targets: list[str]) -> dict[str, Any]:
        """The entry of ``config_groups``, with keys that the readers of both engines know."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group or None,
            "dynamic": False,
        }
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs if self.activations else None,
            "output_activations": None,
            "format": self.layout,
        }


def scheme_of(row: PlanRow) -> Scheme | None:
    """How a matrix is stored; None for floating-point weights."""
    format: Any = None if row.format is None else build("format", row.format)
    if format is None or name_of(format) != "int":
        return None
    return Scheme(
        layout="int-quantized" if row.activations else "pack-quantized",
        bits=format.bits,
        group=format.group if isinstance(format.group, int) else 0,
        symmetric=format.symmetric,
        activations=row.activations or 0,
        expert=row.role.startswith("expert."),
    )


def layer_tensors(weight: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one layer; codes go in as they are."""
    if scheme.layout == "int-quantized":
        return {"weight": weight.codes.contiguous(), "weight_scale": weight.params["scale"].contiguous()}
    stored = weight.pack()
    tensors = {
        "weight_packed": stored["packed"],
        "weight_scale": stored["scale"].contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = stored["zero_packed"].T.contiguous()
    return tensors


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """What says how each layer is stored; None when nothing is quantized."""
    members: dict[Scheme, list[str]] = {}
    kept: list[str] = []
    for row in plan.rows:
        scheme = scheme_of(row)
        (members.setdefault(scheme, []) if scheme else kept).append(_module(row))
    if not members:
        return None
    modules = [_module(row) for row in plan.rows]
    layouts = {scheme.layout for scheme in members}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "version": LAYOUT_VERSION,
        "quantization_status": "compressed",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{number}": scheme.config(patterns(members[scheme], modules))
            for number, scheme in enumerate(sorted(members))
        },
        "ignore": patterns(kept, modules),
    }
    if not all(scheme.symmetric for scheme in members):
        config["dequantize"] = True  # else transformers expects zero points that are not packed, and fails
    return config


def patterns(names: Sequence[str], modules: Sequence[str]) -> list[str]:
    r"""What matches ``names`` and no other of ``modules``, mostly as regular expressions.

    ``model.layers.0.mlp.up_proj`` and its like become ``re:.*\blayers\.\d+\.mlp\.up_proj$`` when every
    layer's is meant, else the layers are listed. What stands before the first number is left open because
    engines nest the same layers differently. Thousands of experts take one line.
    """
    wanted = set(names)
    alike: dict[str, list[str]] = {}
    for name in modules:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", _inner(name)), []).append(name)
    found: list[str] = []
    for shape, members in alike.items():
        meant = [name for name in members if name in wanted]
        text = rf".*\b{_numbered(shape, meant, whole=len(meant) == len(members))}$"
        if meant == [name for name in modules if re.match(text, name)]:
            found += [f"re:{text}"] if meant else []
        else:
            found += meant
    return found


def _numbered(shape: str, names: list[str], whole: bool) -> str:
    """The expression of a shape: any number, or the first numbers that occur in some of its names."""
    parts = [re.escape(part) for part in shape.split("#")]
    if whole or len(parts) == 1:
        return r"\d+".join(parts)
    layers = sorted({int(match.group(1)) for name in names if (match := re.search(r"\.(\d+)(?=\.|$)", name))})
    return rf"{parts[0]}(?:{'|'.join(map(str, layers))})" + r"\d+".join(parts[1:])


def _inner(name: str) -> str:
    """The part of a module's path that engines agree on: from the list of layers on, or its last word."""
    numbered = re.search(r"[^.]+\.\d+(\..*)?$", name)
    return numbered.group(0) if numbered else name.rpartition(".")[2]


def _module(row: PlanRow) -> str:
    return row.name.removesuffix(".weight")
