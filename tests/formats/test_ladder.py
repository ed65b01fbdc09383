"""The scalar view of formats: the value of every code, and the parameters in which decoding is linear."""

import pytest
import torch

from poise.core.registry import build, names
from poise.planning.grid import EXAMPLES

SPECS = [spec for name in names("format") for spec in EXAMPLES.get(name, (name,))]
SLOW = ("trellis", "binary-lowrank")
UNLIKE = ("binary-residual", "e8", "float", "iq1", "iq2", "iq3", "trellis", "vector", "binary-lowrank")
"""Formats whose codes have no value of their own: vectors, sums of parts, floats."""


def fitted(spec):
    format = build("format", spec).resolve("float16")
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    return format, weight, format.fit(weight)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith(UNLIKE)])
def test_the_nearest_rung_is_what_round_finds(spec):
    format, weight, params = fitted(spec)
    rungs = format.ladder(params, 8, 512)
    codes = format.round(weight, params)
    value = format.decode(codes, params)
    n = format.group_of(512)
    for column in (0, 1, 100, 511):
        near = (rungs[:, column // n] - weight[:, column, None]).abs()
        assert torch.allclose(near.amin(1), (value[:, column] - weight[:, column]).abs(), atol=1e-9)
        position = (format.alphabet[None] == codes[:, column, None]).int().argmax(1)
        assert torch.equal(format.alphabet[position], codes[:, column])
        assert torch.equal(rungs[torch.arange(8), column // n, position], value[:, column])


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.startswith(UNLIKE)])
def test_what_has_no_value_of_its_own_says_so(spec):
    assert build("format", spec).alphabet is None


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith(SLOW)])
def test_decoding_is_linear_in_linear_parameters(spec):
    format, weight, params = fitted(spec)
    codes = format.round(weight, params)
    total = torch.zeros_like(weight)
    for key, part in format.basis(codes, params).items():
        span = format.span_of(key, 512)
        total += part * params[key].float().repeat_interleave(span, dim=1)[:, :512]
    if format.linear:
        assert torch.allclose(total, format.decode(codes, params), atol=1e-6)
