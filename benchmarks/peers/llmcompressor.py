"""llm-compressor: GPTQ, GPTQ on ranges weighted by second moments, AWQ. See ``contract`` for the command line.

``gptq`` is the default modifier (activation order, static groups, ranges from extremes); ``imatrix`` gives it the observer
of the project's own low-bit example; ``awq`` searches scales of channels (both kinds of scaling), then ranges by squared
error. Scales become float16, as the others store them; values come from compressed-tensors.
"""

import time
from typing import Any

from contract import Outcome, Task, affine_bits, drive, is_linear


def run(task: Task, modifiers: Any, observer: str) -> Outcome:
    """Quantizes block after block on the inputs that the quantized blocks before give.

    Args:
        modifiers: makes the recipe of a scheme.
    """
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    windows = task.windows()
    arguments = QuantizationArgs(
        num_bits=task.bits, symmetric=False, strategy="group", group_size=task.group, observer=observer
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    data = Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    )
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=modifiers({"group_0": scheme}),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    seconds = time.perf_counter() - start
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if not is_linear(f"{name}.weight"):
            continue
        scale, zero = module.weight_scale.half().float(), module.weight_zero_point
        chosen = module.quantization_scheme.weights
        # The weight holds values under the scale before it became float16: the codes are the same.
        codes = quantize(module.weight.data, module.weight_scale, zero, chosen)
        weights[f"{name}.weight"] = dequantize(codes, scale, zero, chosen)
    return Outcome(
        weights=weights,
        seconds=seconds,
        bits=affine_bits(task),
        settings={"observer": observer, "modifiers": [repr(one) for one in modifiers({"group_0": scheme})]},
    )


def gptq(task: Task) -> Outcome:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return run(
        task,
        lambda groups: [GPTQModifier(config_groups=groups, ignore=["lm_head"])],
        "memoryless_minmax",
    )


def imatrix(task: Task) -> Outcome:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return run(task, lambda groups: [GPTQModifier(config_groups=groups, ignore=["lm_head"])], "imatrix_mse")


def awq(task: Task) -> Outcome:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    # 0.14.0 pins activations for a later copy to an accelerator even where there is none, and torch refuses.
    IntermediatesCache._pin_intermediate = lambda *_: None

    return run(
        task,
        lambda groups: [
            AWQModifier(duo_scaling="both"),
            QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
        ],
        "memoryless_mse",
    )


if __name__ == "__main__":
    drive("llmcompressor", {"gptq": gptq, "imatrix": imatrix, "awq": awq}, __doc__)
