"""torchao: half-quadratic scales and plain rounding, no data. See ``contract`` for the command line.

``hqq`` is torchao's own copy of the half-quadratic search, the one behind its 4-bit configuration. The public configuration
offers it for a layout that only CUDA has, so the function is called. ``hqq-scale`` and ``affine`` are the two algorithms of
the public ``IntxWeightOnlyConfig``: symmetric codes without zero points, and ranges from extremes.

What is left out: its GPTQ asserts a CUDA device (0.18.0, ``prototype/gptq/api.py``), and its AWQ keeps scales of
activations beside every linear at run time, so the weights alone are no groups of integers.
"""

import time
from typing import Any

from contract import Outcome, Task, affine_bits, drive, is_linear


def each(task: Task, settings: dict[str, Any], bits: float, solve: Any) -> Outcome:
    """Quantizes every linear by itself.

    Args:
        solve: a matrix to what decodes to its de-quantized values.
    """
    from safetensors.torch import load_file

    weights = load_file(task.model / "model.safetensors")
    seconds = 0.0
    for name in filter(is_linear, weights):
        start = time.perf_counter()
        decode = solve(weights[name])
        seconds += time.perf_counter() - start
        weights[name] = decode()
    return Outcome(weights=weights, seconds=seconds, bits=bits, settings=settings)


def hqq(task: Task) -> Outcome:
    import torch
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as choose
    from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm as dequantize

    def solve(weight: Any) -> Any:
        codes, scale, zero, *_ = choose(
            weight, nbits=task.bits, group_size=task.group, axis=1, compute_dtype=torch.float16, device="cpu"
        )
        return lambda: dequantize(
            codes, (1, task.group), scale.float(), zero.float(), torch.uint8, 0, 2**task.bits - 1
        )

    settings = {"function": choose.__name__, "axis": 1}
    return each(task, settings, affine_bits(task, zero=16), solve)


def intx(task: Task, algorithm: str, mapping: str, bits: float) -> Outcome:
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_api import IntxWeightOnlyConfig
    from torchao.quantization.quant_primitives import MappingType

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{task.bits}"),
        granularity=PerGroup(task.group),
        mapping_type=MappingType[mapping],
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=algorithm,
    )

    def solve(weight: Any) -> Any:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(linear, config)
        return lambda: linear.weight.dequantize()

    return each(task, {"config": repr(config)}, bits, solve)


def hqq_scale(task: Task) -> Outcome:
    return intx(task, "hqq_scale_only", "SYMMETRIC", task.bits + 16 / task.group)


def affine(task: Task) -> Outcome:
    return intx(task, "affine", "ASYMMETRIC", affine_bits(task))


if __name__ == "__main__":
    drive("torchao", {"hqq": hqq, "hqq-scale": hqq_scale, "affine": affine}, __doc__)
