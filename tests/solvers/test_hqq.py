"""Half-quadratic ranges: the norm falls, outliers are let go, and nothing depends on data or slabs."""

import pytest
import torch

from poise.core import slabs
from poise.core.errors import UsageError
from poise.core.registry import build

SPECS = [
    "int(bits=2, group=64, symmetric=False)",
    "int(bits=3, group=64, symmetric=False, zero='minimum')",
    "int(bits=4, group=64)",
    "nf(bits=3)",
    "q4_k",
    "q3_k",
    "iq2_xs",
    "e8",
]


def weights(rows=48, columns=256):
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=dice) * 0.02
    weight[torch.rand(weight.shape, generator=dice) < 0.01] *= 6
    return weight


def solve(solver, weight, spec):
    return build("solver", solver).solve(weight, build("format", spec).resolve("float16")).decode()


def norm(weight, decoded, p, spec):
    """In units of the scales of the full range."""
    format = build("format", spec).resolve("float16")
    params = format.cover(weight)
    key = format.linear[0]
    span = format.span_of(key, weight.shape[1])
    step = params[key].float().abs().repeat_interleave(span, dim=1)
    return float(((weight - decoded) / step).abs().pow(p).sum())


@pytest.mark.parametrize("spec", SPECS)
def test_the_norm_is_not_larger_than_that_of_the_full_range(spec):
    weight = weights()
    covered, found = solve("rtn", weight, spec), solve("hqq", weight, spec)
    assert norm(weight, found, 0.7, spec) <= norm(weight, covered, 0.7, spec) * 1.02


@pytest.mark.parametrize("spec", SPECS[:4])
def test_outliers_are_let_go(spec):
    """Most weights come nearer, the largest ones move away."""
    weight = weights()
    far = weight.abs() > 0.07
    before, after = ((weight - solve(name, weight, spec)).square() for name in ("rtn", "hqq"))
    assert after[~far].mean() < before[~far].mean()
    assert after[far].mean() > before[far].mean()


def test_a_squared_norm_is_least_squares():
    weight, spec = weights(), SPECS[1]
    before, after = ((weight - solve(name, weight, spec)).square().sum() for name in ("rtn", "hqq(p=2.0)"))
    assert after < before


def test_slabs_change_nothing(monkeypatch):
    weight = weights()
    whole = solve("hqq", weight, SPECS[0])
    monkeypatch.setattr(slabs, "WEIGHTS", 5 * 256)
    assert torch.equal(solve("hqq", weight, SPECS[0]), whole)


def test_formats_without_linear_parameters_are_covered():
    weight = weights()
    assert torch.equal(solve("hqq", weight, "mxfp4"), solve("rtn", weight, "mxfp4"))


def test_zeros_and_constants_stay_finite():
    weight = torch.zeros(4, 64)
    weight[1] = 0.5
    for spec in SPECS[:4]:
        assert bool(torch.isfinite(solve("hqq", weight, spec)).all())


def test_bad_norms_are_refused():
    with pytest.raises(UsageError, match="p is between"):
        build("solver", "hqq(p=0)")
