"""Values of small floating-point types without infinities and NaN."""

import torch
from torch import Tensor


def minifloat(exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Value of every code s eee mmm, float32 [2^(1 + e + m)] (OCP Microscaling v1.0, section 5.3).

    The exponent is biased by 2^(e-1) - 1; exponent zero is subnormal: m / 2^M * 2^(1 - bias).
    """
    count = 1 << exponent_bits + mantissa_bits
    code = torch.arange(count)
    exponent, mantissa = code >> mantissa_bits, (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    bias = (1 << exponent_bits - 1) - 1
    significand = torch.where(exponent == 0, mantissa, 1 + mantissa)
    positive = torch.ldexp(significand, exponent.clamp(min=1) - bias)
    return torch.cat((positive, -positive))
