"""What products of matrices are made of while a model is trained, writes, or gives gradients."""

from contextlib import AbstractContextManager

import torch


def product_dtype() -> torch.dtype:
    """bfloat16 where the processor has instructions that its products can be made of; else float32, which is several times faster there."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


def product_name() -> str:
    """Its name, as engines take it."""
    return str(product_dtype()).removeprefix("torch.")


def products() -> AbstractContextManager[None]:
    """Products inside are made of such factors."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=product_dtype() == torch.bfloat16)
