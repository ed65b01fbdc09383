"""Error feedback for one matrix by a peer's own routine, in the peer's environment; ``feedback.py`` starts it.

    python benchmarks/peers/routine.py NAME FILE OUT --bits 4 --group 128

FILE is a safetensors file with ``weight`` [rows, columns] and ``inputs`` [tokens, columns]; OUT receives ``weight``, the
values of the codes. Prints the seconds of ranges and error feedback as JSON; summing up the Hessian is not counted. It is done
twice and the second is timed: models have hundreds of matrices.
"""

import argparse
import json
import os
import time
from typing import Any

import contract  # noqa: F401  takes this folder off the path, where drivers bear the names of packages
import torch
from safetensors.torch import load_file, save_file


def gptqmodel(weight: Any, inputs: Any, bits: int, group: int) -> tuple[Any, float]:
    """With the settings that its own loop uses for a layer."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    routine = GPTQ(layer, QuantizeConfig(bits=bits, group_size=group, sym=False, device="cpu"))
    routine.quantizer.configure(perchannel=True)
    routine.expected_nsamples = len(inputs)
    for part in inputs.split(2048):
        routine.add_batch(part.unsqueeze(0), None)
    start = time.perf_counter()
    values = routine.quantize()[0]
    return values.float(), time.perf_counter() - start


def llmcompressor(weight: Any, inputs: Any, bits: int, group: int) -> tuple[Any, float]:
    """With the modifier's defaults: activation order, static groups, ranges from extremes."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    arguments = QuantizationArgs(
        num_bits=bits, symmetric=False, strategy="group", group_size=group, actorder="static"
    )
    hessian = 2 * inputs.T @ inputs / len(inputs)
    start = time.perf_counter()
    groups = weight.view(len(weight), -1, group)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    values, _, fell_back = quantize_weight(
        weights=weight.clone().unsqueeze(0),
        hessians=hessian.unsqueeze(0),
        scale=scale.unsqueeze(0),
        zero_point=zero.unsqueeze(0),
        global_scale=None,
        quant_args=arguments,
    )
    seconds = time.perf_counter() - start
    if bool(fell_back.any()):
        raise SystemExit("llm-compressor fell back to rounding to nearest")
    return values[0].float(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["gptqmodel", "llmcompressor"])
    parser.add_argument("file")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    arguments = parser.parse_args()
    given = load_file(arguments.file)
    routine = {"gptqmodel": gptqmodel, "llmcompressor": llmcompressor}[arguments.name]
    for _ in range(2):
        values, seconds = routine(given["weight"].clone(), given["inputs"], arguments.bits, arguments.group)
    save_file({"weight": values.contiguous()}, arguments.out)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
