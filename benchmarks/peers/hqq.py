"""HQQ: half-quadratic zero points, no data. See ``contract`` for the command line.

Groups lie in rows (``axis=1``), as its kernels for inference want them, with the package's own settings for a width: zero
points are whole at 4 bits alone. Scale and zero point are float16, so a weight has more bits than with codes as zeros.
"""

import time

from contract import Outcome, Task, affine_bits, drive, is_linear


def quantize(task: Task) -> Outcome:
    """Quantizes every linear by itself."""
    import torch
    from hqq.core.quantize import Quantizer, hqq_base_quant_config
    from safetensors.torch import load_file

    settings = hqq_base_quant_config(nbits=task.bits, group_size=task.group, axis=1)["weight_quant_params"]
    weights = load_file(task.model / "model.safetensors")
    seconds = 0.0
    for name in filter(is_linear, weights):
        start = time.perf_counter()
        codes, meta = Quantizer.quantize(weights[name], device="cpu", compute_dtype=torch.float32, **settings)
        seconds += time.perf_counter() - start
        meta |= {key: meta[key].half().float() for key in ("scale", "zero")}
        weights[name] = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    return Outcome(weights=weights, seconds=seconds, bits=affine_bits(task, zero=16), settings=settings)


if __name__ == "__main__":
    drive("hqq", {"hqq": quantize}, __doc__)
