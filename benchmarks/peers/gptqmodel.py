"""GPTQModel: GPTQ and its descendants. See ``contract`` for the command line.

``gptq`` is the default configuration (group-aware activation order); ``gptaq`` adds asymmetric calibration, ``foem`` also
the first-order term, both with the strengths that the package recommends; ``ordered`` is GPTAQ in full activation order
with static groups and ranges by squared error. The second version of its layout holds every zero point.
"""

import os
import time
from typing import Any

from contract import Outcome, Task, affine_bits, drive, is_linear


def run(task: Task, **settings: Any) -> Outcome:
    """Quantizes part after part of every block, in its own order."""
    # By default it takes half the cores as workers, and with fewer than two of them it does not start.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import FORMAT

    windows = task.windows()
    config = QuantizeConfig(
        bits=task.bits,
        group_size=task.group,
        sym=False,
        format=FORMAT.GPTQ_V2,
        offload_to_disk=False,
        device="cpu",
        **settings,
    )
    model = GPTQModel.load(str(task.model), config, dtype=torch.float32)
    data = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in windows]
    start = time.perf_counter()
    model.quantize(data, batch_size=1, calibration_sort=None)
    seconds = time.perf_counter() - start
    weights = dict(model.model.state_dict())
    for name, module in model.model.named_modules():
        if is_linear(f"{name}.weight"):
            module.scales = module.scales.float()
            weights[f"{name}.weight"] = module.dequantize_weight().T.float()
    return Outcome(
        weights=weights,
        seconds=seconds,
        bits=affine_bits(task),
        settings={
            key: value if isinstance(value, bool | int | float) else repr(value)
            for key, value in settings.items()
        },
    )


def gptq(task: Task) -> Outcome:
    return run(task)


def gptaq(task: Task) -> Outcome:
    from gptqmodel.quantization.config import GPTAQConfig

    return run(task, gptaq=GPTAQConfig(alpha=0.25))


def foem(task: Task) -> Outcome:
    from gptqmodel.quantization.config import FOEMConfig

    return run(task, foem=FOEMConfig(alpha=0.25, beta=0.2))


def ordered(task: Task) -> Outcome:
    from gptqmodel.quantization.config import GPTAQConfig

    return run(
        task,
        desc_act=True,
        act_group_aware=False,
        static_groups=True,
        mse=2.0,
        gptaq=GPTAQConfig(alpha=0.25),
    )


if __name__ == "__main__":
    drive("gptqmodel", {"gptq": gptq, "gptaq": gptaq, "foem": foem, "ordered": ordered}, __doc__)
