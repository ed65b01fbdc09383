"""AutoRound: rounding and ranges learned on the output of each block. See ``contract`` for the command line.

``default`` and ``light`` are the recipes of that name of its command line, on these tokens instead of its own text;
``extended`` turns on the extension that its pages advise at 2 bits. It computes in float32: its default casts the model to
bfloat16, which would change the weights before they are rounded. It tunes on a GPU where there is one.
"""

import time
from typing import Any

from contract import Outcome, Task, affine_bits, drive, is_linear


def run(task: Task, **settings: Any) -> Outcome:
    """Tunes block after block on the inputs that the quantized blocks before give."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = task.windows()
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings |= {"batch_size": 8, "seqlen": windows.shape[1], "nsamples": len(windows), "device_map": device}
    batches = [{"input_ids": batch} for batch in windows.split(settings["batch_size"])]
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(task.model),
        bits=task.bits,
        group_size=task.group,
        sym=False,
        dataset=batches,
        seed=task.seed,
        amp=False,
        enable_torch_compile=False,
        **settings,
    )
    start = time.perf_counter()
    tuned, _ = tuner.quantize()
    seconds = time.perf_counter() - start
    weights = {name: weight.cpu() for name, weight in tuned.state_dict().items()}
    for name, module in tuned.named_modules():
        if is_linear(f"{name}.weight") and module.scale.dtype != torch.float16:
            raise SystemExit(f"{name}: scales are {module.scale.dtype}, float16 was counted")
    return Outcome(weights=weights, seconds=seconds, bits=affine_bits(task), settings=settings)


def default(task: Task) -> Outcome:
    return run(task, iters=200)


def light(task: Task) -> Outcome:
    return run(task, iters=50, lr=5e-3)


def extended(task: Task) -> Outcome:
    return run(task, iters=200, enable_alg_ext=True)


if __name__ == "__main__":
    drive("auto-round", {"default": default, "light": light, "extended": extended}, __doc__)
