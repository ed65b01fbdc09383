"""What is said of a solved matrix: its error under the Hessian, of some rows where all are too many."""

import math

import pytest
import torch

from poise.core.plan import PlanRow
from poise.core.registry import build
from poise.core.squares import energy
from poise.core.stats import Stats
from poise.pipeline.solving import JUDGED, solve_matrix


def row(rows, columns, format, solver="gptq"):
    return PlanRow(
        name="w",
        role="ffn.up",
        rows=rows,
        columns=columns,
        format=format,
        solver=solver,
        activations=None,
        reason="",
    )


def statistics(columns):
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(4 * columns, columns, generator=dice) @ torch.randn(columns, columns, generator=dice)
    hessian = x.T @ x / len(x)
    return Stats(second_moment=hessian.diagonal().clone(), n_tokens=len(x), data_hash="", hessian=hessian)


def ratio(lost, weight, hessian):
    lost, weight, hessian = lost.double(), weight.double(), hessian.double()
    return float(((lost @ hessian) * lost).sum() / ((weight @ hessian) * weight).sum())


@pytest.mark.parametrize("columns", [1, 64, 130, 700])
def test_energy_is_what_the_whole_product_gives(columns):
    stats = statistics(columns)
    rows = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    expected = float(((rows.double() @ stats.hessian.double()) * rows).sum())
    assert energy(rows, stats.hessian) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "format", "step"),
    [
        (JUDGED, "int(bits=3, group=32, symmetric=False)", 1),
        (JUDGED + 1, "int(bits=3, group=32, symmetric=False)", 2),
        (3 * JUDGED, "q4_0", 3),
        (2 * JUDGED, "nf4", 2),
        (2 * JUDGED, "int(bits=4, group='tensor')", 1),
    ],
)
def test_errors_are_those_of_rows_evenly_spread(rows, format, step):
    """By hand, in float64; all rows where they share a scale."""
    weight, stats = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2)), statistics(64)
    built = build("format", format)
    found, outcome = solve_matrix(weight, row(rows, 64, format), build("solver", "gptq"), built, stats)
    some = slice(None, None, step)
    nearest = build("solver", "rtn").solve(weight, built)
    lost, plain = weight - found.decode(), weight - nearest.decode()
    assert outcome.output_error == pytest.approx(ratio(lost[some], weight[some], stats.hessian), rel=1e-4)
    assert outcome.nearest == pytest.approx(ratio(plain[some], weight[some], stats.hessian), rel=1e-4)
    assert outcome.weight_error == pytest.approx(float(lost.square().sum() / weight.square().sum()), rel=1e-4)
    assert outcome.output_error == pytest.approx(ratio(lost, weight, stats.hessian), rel=0.1)


def test_without_statistics_only_the_weights_tell():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    _, outcome = solve_matrix(
        weight, row(8, 64, "q8_0", "rtn"), build("solver", "rtn"), build("format", "q8_0"), None
    )
    assert math.isnan(outcome.output_error)
    assert math.isnan(outcome.nearest)
    assert 0 < outcome.weight_error < 1e-3
