"""The range search: never worse than rtn, and it minimises what it says."""

import pytest
import torch

from poise.core.registry import build
from poise.core.stats import Stats

GRIDS = [
    "int(bits=4, group=32)",
    "int(bits=3, group=64, symmetric=False)",
    "int(bits=2, group=64, symmetric=False)",
    "int(bits=4, group=32, symmetric=False, zero='minimum')",
    "int(bits=4, group='channel')",
    "int(bits=4, group='tensor')",
    "int(bits=8, group=32, scale='float16')",
    "int(bits=8, group=32, scale='bfloat16')",
    "int(bits=4, group=32, scale='e8m0')",
    "nf(bits=4, group=64, scale='bfloat16')",
]


def weights(rows=64, columns=256):
    """Heavy tails: a few outliers in every row."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) / torch.rand(
        rows, columns, generator=generator
    ).clamp(0.05)


def stats(importance):
    return Stats(second_moment=importance, n_tokens=1, data_hash="")


def errors(weight, spec, solver, importance=None):
    given = None if importance is None else stats(importance)
    solved = build("solver", solver).solve(weight, build("format", spec), given)
    squared = (solved.decode() - weight).square()
    weighted = squared if importance is None else squared * importance
    if "tensor" in spec:
        return weighted.sum().view(1, 1)
    return weighted.view(len(weight), -1, build("format", spec).group_of(weight.shape[1])).sum(-1)


@pytest.mark.parametrize("spec", GRIDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_group_is_worse_than_with_rtn(spec, weighted):
    weight = weights()
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else None
    search, rtn = (errors(weight, spec, solver, importance) for solver in ("search", "rtn"))
    assert (search <= rtn * 1.004).all()  # the best scale is found first and rounded to float16 then
    assert search.sum() < rtn.sum()


def test_importance_moves_error_away_from_what_matters():
    weight, spec = weights(), "int(bits=3, group=64, symmetric=False)"
    importance = torch.ones(256)
    importance[::64] = 100.0
    flat, weighted = (
        build("solver", "search").solve(weight, build("format", spec), given).decode()
        for given in (None, stats(importance))
    )

    def error(decoded):
        return (decoded - weight).square()[:, ::64].sum()

    assert error(weighted) < 0.7 * error(flat)


def test_uniform_importance_changes_nothing():
    weight, spec = weights(), "int(bits=4, group=32)"
    flat, same = (
        build("solver", "search").solve(weight, build("format", spec), given)
        for given in (None, stats(torch.full((256,), 4.0)))
    )
    assert torch.equal(flat.codes, same.codes)


def test_the_best_scale_of_a_two_level_grid_is_found():
    """One group, codes -1 and 0 times a scale: least squares over the negative half, by hand."""
    weight = torch.tensor([[-1.0] * 8 + [0.1] * 8])
    solved = build("solver", "search").solve(
        weight, build("format", "int(bits=1, group=16, scale='float32')")
    )
    assert torch.allclose(solved.decode(), torch.tensor([[-1.0] * 8 + [0.0] * 8]))


@pytest.mark.parametrize("solver", ["rtn", "search"])
def test_slabs_do_not_change_the_result(solver, monkeypatch):
    weight, format = weights(40, 96), build("format", "int(bits=4, group=32)")
    whole = build("solver", solver).solve(weight, format)
    monkeypatch.setattr("poise.core.slabs.WEIGHTS", 96 * 7)
    slabs = build("solver", solver).solve(weight, format)
    assert torch.equal(whole.codes, slabs.codes)


def test_a_float_format_is_a_cast():
    weight = weights().bfloat16()
    for solver in ("rtn", "search"):
        solved = build("solver", solver).solve(weight, build("format", "float(dtype='bfloat16')"))
        assert torch.equal(solved.codes, weight)


def test_statistics_of_another_layer_are_refused():
    from poise.core.errors import FormatError

    with pytest.raises(FormatError, match="256 columns, but statistics of 8 inputs"):
        build("solver", "search").solve(
            weights(), build("format", "int(bits=4, group=32)"), stats(torch.ones(8))
        )
    with pytest.raises(ValueError, match="finite and not negative"):
        stats(torch.tensor([1.0, -1.0]))
