"""Observed ranges under round to nearest."""

import pytest
import torch

from poise.core.errors import UsageError
from poise.core.registry import build
from poise.planning.grid import specs

GRIDS = (
    "int(bits=4, group=32, symmetric=False)",
    "int(bits=3, group=64)",
    "nf",
    "int(bits=4, group='128x128')",
)


def weights(rows=128, columns=256, tails=True):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator)
    return w / torch.rand(rows, columns, generator=generator).clamp(0.05) if tails else w


def solve(weight, spec, solver):
    return build("solver", solver).solve(weight, build("format", spec))


def error(weight, spec, solver):
    return float((solve(weight, spec, solver).decode() - weight).square().sum())


@pytest.mark.parametrize("spec", specs())
@pytest.mark.parametrize("observed", ["absmax", "minmax"])
def test_ranges_that_hold_all_weights_are_round_to_nearest(spec, observed):
    weight = weights()
    if build("format", spec).misfit(*weight.shape):
        weight = weights(16, 512)
    found, expected = solve(weight, spec, f"observer(range='{observed}')"), solve(weight, spec, "rtn")
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("spec", GRIDS)
@pytest.mark.parametrize("observed", ["percentile", "mse", "entropy"])
def test_weights_are_clipped_to_what_the_group_calls_for(spec, observed):
    weight = weights()
    found = solve(weight, spec, f"observer(range='{observed}', percentile=95)")
    nearest = solve(weight, spec, "rtn")
    assert found.decode().abs().max() <= nearest.decode().abs().max() * 1.001
    assert not torch.equal(found.codes, nearest.codes)


@pytest.mark.parametrize(
    "spec",
    ["int(bits=2, group=64, symmetric=False, zero='minimum')", "int(bits=3, group=64, symmetric=False)"],
)
def test_mse_lowers_the_error_of_weights_and_search_lowers_it_more(spec):
    weight = weights()
    mse, rtn, search = (error(weight, spec, solver) for solver in ("observer(range='mse')", "rtn", "search"))
    assert search < mse < 0.97 * rtn


def test_a_group_of_its_own_is_a_range_of_its_own():
    """One row, two groups, worked out by hand: the middle half of each group is one value."""
    weight = torch.tensor([[1.0] * 15 + [64.0] + [0.25] * 15 + [-16.0]])
    found = solve(
        weight,
        "int(bits=2, group=16, symmetric=False, scale='float32')",
        "observer(range='percentile', percentile=50)",
    )
    assert torch.allclose(found.decode(), torch.tensor([[1.0] * 15 + [3.0] + [0.25] * 15 + [0.0]]))
    symmetric = solve(
        weight,
        "int(bits=2, group=16, symmetric=False, zero='minimum', scale='float32')",
        "observer(range='percentile', percentile=50, symmetric=True)",
    )
    assert torch.allclose(symmetric.decode(), torch.tensor([[1.0] * 16 + [0.25] * 15 + [-0.25]]))


@pytest.mark.parametrize(
    "spec", ["int(bits=4, group=48)", "int(bits=4, group='24x40')", "int(bits=4, group='tensor')"]
)
def test_groups_at_the_edges(spec):
    """50 rows and 110 columns: no whole number of any of these groups."""
    weight = weights(50, 110)
    found = solve(weight, spec, "observer(range='percentile', percentile=90)").decode()
    assert found.shape == weight.shape
    if "48" in spec:
        alone = solve(
            weight[:, 96:].contiguous(), spec, "observer(range='percentile', percentile=90)"
        ).decode()
        assert torch.equal(found[:, 96:], alone)


@pytest.mark.parametrize("observed", ["percentile", "mse", "entropy"])
def test_slabs_do_not_change_the_codes(observed, monkeypatch):
    weight, solver = weights(64, 128), f"observer(range='{observed}')"
    for spec in ("int(bits=4, group=32)", "int(bits=4, group='16x64')"):
        whole = solve(weight, spec, solver)
        with monkeypatch.context() as patch:
            patch.setattr("poise.core.slabs.WEIGHTS", 128 * 7)
            assert torch.equal(whole.codes, solve(weight, spec, solver).codes)


def test_options_are_checked():
    with pytest.raises(UsageError, match="range is absmax"):
        build("solver", "observer(range='median')")
    with pytest.raises(UsageError, match="percentile is above 0"):
        build("solver", "observer(percentile=0)")


def test_an_empty_weight_has_no_codes():
    assert solve(torch.empty(0, 64), "int(bits=4, group=32)", "observer").codes.shape == (0, 64)
