"""Error feedback and refinement: against recomputation from scratch, under every invariance, for every format."""

import warnings
from dataclasses import replace

import pytest
import torch

from poise.core import slabs
from poise.core.errors import FormatError, PoiseWarning, UsageError
from poise.core.format import QTensor
from poise.core.hessian import factorize
from poise.core.registry import build, names
from poise.core.stats import Stats
from poise.planning.grid import EXAMPLES
from poise.solvers._sweep import NEAR
from poise.solvers.gptq import Gptq

LEFT_OUT = ("trellis", "binary-lowrank", "float(dtype='float32')")
"""Slow ones, and one that loses nothing."""
SPECS = [
    spec for name in names("format") for spec in EXAMPLES.get(name, (name,)) if not spec.startswith(LEFT_OUT)
]
WHOLE_ROWS = "binary-lowrank"
INT3 = "int(bits=3, group=32, symmetric=False)"
COLUMNS = 256


def inputs(columns=COLUMNS, tokens=1024, seed=0):
    """Correlated inputs, a few of them large."""
    dice = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=dice) * torch.logspace(0, -1.5, columns)
    x = torch.randn(tokens, columns, generator=dice) @ mix / columns**0.5
    return x + 0.3 * torch.randn(tokens, 1, generator=dice)


def stats_of(x, original=None):
    hessian = x.T @ x / len(x)
    return Stats(
        second_moment=hessian.diagonal().clone(),
        hessian=hessian,
        cross=None if original is None else original.T @ x / len(x),
        n_tokens=len(x),
        data_hash="",
    )


def weight_of(rows=32, columns=COLUMNS, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def format_of(spec):
    return build("format", spec).resolve("float16")


def loss(weight, quantized, hessian):
    lost = (weight - quantized.decode()).double()
    return float(((lost @ hessian.double()) * lost).sum())


def solve(solver, weight, spec, stats, **kwargs):
    return build("solver", solver).solve(weight, format_of(spec), stats, **kwargs)


def by_recomputation(weight, format, params, hessian, width):
    """Optimal brain quantization as it is defined: after each unit, what is left is corrected by the inverse of what is
    left of the Hessian, which is inverted anew."""
    work, n = weight.double().clone(), weight.shape[1]
    codes = []
    for first in range(0, n, width):
        place = slice(first, first + width)
        inverse = torch.linalg.inv(hessian[first:, first:])
        metric = None if width == 1 else torch.linalg.inv(inverse[:width, :width]).diagonal().float()
        part = format.at(params, place)
        found = format.round(work[:, place].float().contiguous(), part, metric)
        codes.append(found)
        error = work[:, place] - format.decode(found, part).double()
        rest = torch.linalg.solve(inverse[:width, :width], inverse[:width, width:])
        work[:, first + width :] -= error @ rest
    return torch.cat(codes, dim=1)


@pytest.mark.parametrize(
    "spec",
    [
        INT3,
        "int(bits=4, group=32)",
        "int(bits=6, group=32)",
        "nf(bits=3)",
        "q4_k",
        "q3_k",
        "mxfp4",
        "e8",
        "iq2_xs",
        "iq3_s",
    ],
)
def test_equals_recomputing_the_inverse_at_every_step(spec):
    weight, stats, format = weight_of(8), stats_of(inputs()), format_of(spec)
    found = solve("gptq(act_order=False)", weight, spec, stats)
    wide = damped_double(stats.hessian)
    expected = by_recomputation(weight, format, found.params, wide, format.width)
    decoded = format.decode(expected, found.params)
    assert (
        (found.decode() == decoded).float().mean() > 0.995
    )  # float32 against float64: a weight halfway between two levels may fall either way
    assert loss(weight, found, stats.hessian) == pytest.approx(
        loss(weight, QTensor(codes=expected, params=found.params, format=format), stats.hessian), rel=0.02
    )


def left_over(hessian, width):
    """What an error of each column costs after all columns behind its unit have made up for it, by inverting what is left of
    the Hessian at every step."""
    costs = []
    for first in range(0, len(hessian), width):
        inverse = torch.linalg.inv(hessian[first:, first:])
        costs.append(torch.linalg.inv(inverse[:width, :width]).diagonal())
    return torch.cat(costs)


def damped_double(hessian, damp=0.01):
    wide = hessian.double()
    return wide + damp * wide.diagonal().mean() * torch.eye(len(wide))


@pytest.mark.parametrize("spec", [INT3, "e8"])
def test_parameters_are_fitted_between_what_errors_cost_before_and_after_feedback(spec):
    """Under the geometric mean of the two; with errors as they are alone, as in a plain search, much more is lost."""
    weight, stats, format = weight_of(), stats_of(inputs()), format_of(spec)
    found = solve("gptq(act_order=False)", weight, spec, stats)
    wide = damped_double(stats.hessian)
    between = (stats.second_moment.double() * left_over(wide, format.width)).sqrt().float()
    expected = format.fit(weight, between)
    for key, value in found.params.items():
        assert torch.isclose(value.float(), expected[key].float(), rtol=2e-3).float().mean() > 0.98
    alone = format.fit(weight, stats.second_moment)
    codes = by_recomputation(weight, format, alone, wide, format.width)
    assert loss(weight, found, stats.hessian) < 0.99 * loss(
        weight, QTensor(codes=codes, params=alone, format=format), stats.hessian
    )


@pytest.mark.parametrize("spec", [INT3, "e8"])
def test_twice_fits_to_what_columns_were_rounded_from(spec):
    """Its parameters are those that the sum of weights and feedback asks for; feedback by recomputation."""
    weight, stats, format = weight_of(), stats_of(inputs()), format_of(spec)
    wide, width = damped_double(stats.hessian), format.width
    once = solve("gptq(act_order=False)", weight, spec, stats)
    twice = solve("gptq(act_order=False, groups='twice')", weight, spec, stats)
    lost, rounded_from = weight.double() - once.decode().double(), torch.empty(weight.shape)
    for first in range(0, COLUMNS, width):
        # Where the columns of a unit and after it are best when those before have lost what they have.
        rest = wide[first:, first:]
        shift = torch.linalg.solve(rest, wide[first:, :first] @ lost[:, :first].T).T
        rounded_from[:, first : first + width] = (weight[:, first : first + width] + shift[:, :width]).float()
    between = (stats.second_moment.double() * left_over(wide, width)).sqrt().float()
    expected = format.fit(rounded_from, between)
    for key, value in twice.params.items():
        assert torch.isclose(value.float(), expected[key].float(), rtol=2e-3).float().mean() > 0.98
    assert any(not torch.equal(twice.params[key], once.params[key]) for key in once.params)


@pytest.mark.parametrize("n", [1, 24, 701])
def test_the_factor_is_that_of_the_damped_hessian(n):
    hessian = stats_of(inputs(n)).hessian
    factor = factorize(hessian, damp=0.01)
    wide = damped_double(hessian)
    inverse = torch.linalg.inv(factor.upper.double())
    assert torch.allclose(
        inverse @ wide[factor.order][:, factor.order] @ inverse.T, torch.eye(n).double(), atol=1e-5
    )
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.equal(hessian.diagonal()[factor.order], hessian.diagonal().sort(descending=True).values)


def test_units_of_the_factor_stay_together():
    hessian = stats_of(inputs(24)).hessian
    blocks = factorize(hessian, damp=0.01, width=8).order.view(3, 8)
    assert torch.equal(blocks - blocks[:, :1], torch.arange(8).expand(3, 8))


@pytest.mark.parametrize(
    "solver",
    ["gptq", "gptaq", "gptq -> refine", "gptq(groups='twice')", "gptq(act_order=False, groups='refit')"],
)
def test_codes_do_not_depend_on_how_the_work_is_cut(solver, monkeypatch):
    weight, x = weight_of(150), inputs()
    stats = stats_of(x, x + 0.05 * inputs(seed=5))
    whole = solve(solver, weight, INT3, stats)
    monkeypatch.setattr(slabs, "WEIGHTS", 7 * COLUMNS)
    monkeypatch.setattr(Gptq, "slab_rows", 1)
    cut = solve(solver, weight, INT3, stats)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2))
    shuffled = solve(solver, weight[order], INT3, stats)
    for other in (cut, shuffled):
        expected = whole[order] if other is shuffled else whole
        assert (other.codes == expected.codes).float().mean() > 0.999  # sums of float32 in another order
    for panel in (1, 5, 64):
        if "->" not in solver:
            spec = solver.replace(")", f", panel={panel})") if "(" in solver else f"{solver}(panel={panel})"
            assert (solve(spec, weight, INT3, stats).codes == whole.codes).float().mean() > 0.999


@pytest.mark.parametrize("spec", SPECS)
def test_an_identity_hessian_is_rounding_to_nearest(spec):
    weight = weight_of(16)
    stats = Stats(
        second_moment=torch.ones(COLUMNS), hessian=torch.eye(COLUMNS), n_tokens=COLUMNS, data_hash=""
    )
    searched, fed = (solve(solver, weight, spec, stats) for solver in ("search", "gptq"))
    assert torch.equal(searched.decode(), fed.decode())


@pytest.mark.parametrize("spec", [*SPECS, WHOLE_ROWS])
def test_output_error_falls_and_weight_error_rises(spec):
    weight, stats = weight_of(), stats_of(inputs())
    searched, fed = (solve(solver, weight, spec, stats) for solver in ("search", "gptq"))
    assert loss(weight, fed, stats.hessian) < 0.95 * loss(weight, searched, stats.hessian)
    moment = torch.diag(stats.second_moment)  # the metric that the search had
    assert loss(weight, fed, moment) > loss(weight, searched, moment)


@pytest.mark.parametrize("spec", [*SPECS, WHOLE_ROWS])
def test_refining_never_raises_the_objective(spec):
    weight, stats = weight_of(24), stats_of(inputs())
    for first in ("rtn", "search", "gptq"):
        start = solve(first, weight, spec, stats)
        refined = solve("refine(damp=0)", weight, spec, stats, start=start)
        before, after = (loss(weight, item, stats.hessian) for item in (start, refined))
        assert after <= before * (1 + 1e-4)
        if first == "rtn":
            assert after < before
        stored = refined.pack()
        assert torch.equal(QTensor.unpack(stored, format_of(spec), COLUMNS).decode(), refined.decode())


def test_refining_is_exact_where_the_best_is_known():
    """Four columns of two levels each: all sixteen choices are tried."""
    dice = torch.Generator().manual_seed(3)
    x = torch.randn(50, 16, generator=dice)
    x[:, 4:] = 0
    stats = stats_of(x)
    weight = torch.randn(64, 16, generator=dice)
    format = format_of("int(bits=1, group=16, symmetric=False)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = build("solver", "search").solve(weight, format, stats)
        found = build("solver", "refine(damp=0, scales=False)").solve(weight, format, stats, start=start)
    choices = torch.cartesian_prod(*[torch.arange(2, dtype=torch.uint8)] * 4)
    best, ours = [], []
    for row in range(64):
        line = start[row : row + 1]
        trial = line.codes.repeat(16, 1)
        trial[:, :4] = choices
        params = {key: value.repeat(16, 1) for key, value in line.params.items()}
        lost = weight[row] - format.decode(trial, params)
        best.append(float(((lost @ stats.hessian) * lost).sum(1).min()))
        ours.append(loss(weight[row : row + 1], found[row : row + 1], stats.hessian))
    assert sum(mine <= least * 1.0001 for mine, least in zip(ours, best, strict=True)) > 50
    assert sum(ours) < 1.1 * sum(best)


def test_two_codes_move_where_one_alone_would_gain_nothing():
    """Of two inputs that correlate, weights 0.6 and -0.6 from their codes: either move alone raises the objective."""
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 0.4
    stats = Stats(second_moment=torch.ones(16), hessian=hessian, n_tokens=16, data_hash="")
    format = format_of("int(bits=3, group=16, symmetric=False)")
    codes, params = (
        torch.full((3, 16), 3, dtype=torch.uint8),
        format.cover(torch.linspace(-3, 4, 16).expand(3, 16)),
    )
    start = QTensor(codes=codes, params=params, format=format)
    weight = start.decode()
    weight[0, :2] += torch.tensor([0.6, -0.6])
    weight[1, :2] += torch.tensor([0.6, 0.6])  # here one alone gains most, and then the other nothing
    weight[2, :2] += torch.tensor([0.5, -0.2])  # and here no move gains
    found = build("solver", "refine(damp=0, scales=False)").solve(weight, format, stats, start=start)
    moved = torch.sign(found.decode() - start.decode())[:, :2]
    assert torch.equal(moved, torch.tensor([[1.0, -1.0], [1.0, 0.0], [0.0, 0.0]]))


def test_no_pair_of_cheap_moves_is_left():
    """Of all pairs of moves by a level that each cost less than the bound, none gains, whatever their signs."""
    weight, stats, format = weight_of(8, 64), stats_of(inputs(64, 256)), format_of("int(bits=3, group=32)")
    found = build("solver", "gptq -> refine(damp=0, scales=False, passes=100)").solve(weight, format, stats)
    hessian, values = stats.hessian.double(), found.decode().double()
    levels = format.ladder(found.params, 8, 64).double().sort(-1).values
    slope = (weight.double() - values) @ hessian
    tried = 0
    for row in range(8):
        moves = []
        for column in range(64):
            ladder = levels[row, column // 32]
            place = int((ladder - values[row, column]).abs().argmin()) + (1 if slope[row, column] > 0 else -1)
            if 0 <= place < len(ladder):
                move = ladder[place] - values[row, column]
                stiff = move**2 * hessian[column, column]
                cost = stiff - 2 * move * slope[row, column]
                assert cost > -1e-4 * stiff  # one alone gains nothing
                if cost < 0.99 * NEAR * stiff:
                    moves.append((column, move, cost, stiff))
        for index, (i, move, cost, stiff) in enumerate(moves):
            for j, other, more, _ in moves[index + 1 :]:
                tried += 1
                assert cost + more + 2 * move * other * hessian[i, j] > -1e-3 * stiff
    assert tried > 100


def test_the_correction_is_least_squares():
    """All of it: the target is the weight that answers on new inputs what the old one answered on the old."""
    original = inputs(48, 400)
    x = original + 0.2 * inputs(48, 400, seed=9)
    weight, stats = weight_of(16, 48), stats_of(x, original)
    solver = build("solver", "gptaq(share=1.0, damp=0)")
    target = solver.target(weight, format_of("int(bits=8, group='channel')"), stats)
    wanted = original.double() @ weight.double().T
    expected = torch.linalg.lstsq(x.double(), wanted).solution.T
    assert float((target - expected).norm() / (target - weight).norm()) < 1e-3
    half = build("solver", "gptaq(share=0.5, damp=0)").target(weight, format_of(INT3), stats)
    assert torch.allclose(half, (weight + target) / 2, atol=1e-6)


def test_the_correction_of_the_stream_is_least_squares():
    """All of it: the target is the weight whose answer, added to the stream, comes nearest to the original's sum."""
    original, before = inputs(48, 400), torch.randn(400, 16, generator=torch.Generator().manual_seed(5))
    x = original + 0.2 * inputs(48, 400, seed=9)
    stream = before + 0.3 * torch.tanh(x[:, :16]) + 0.1 * before.roll(1, 0)
    weight = weight_of(16, 48)
    stats = replace(stats_of(x, original), drift=(before - stream).T @ x / len(x))
    target = build("solver", "gptaq(share=1.0, damp=0)").target(weight, format_of(INT3), stats)
    wanted = (before + original @ weight.T - stream).double()
    expected = torch.linalg.lstsq(x.double(), wanted).solution.T
    assert float((target - expected).norm() / (target - weight).norm()) < 1e-3
    half = build("solver", "gptaq(share=0.5, damp=0)").target(weight, format_of(INT3), stats)
    assert torch.allclose(half, (weight + target) / 2, atol=1e-5)


def test_without_drift_there_is_nothing_to_correct():
    weight, x = weight_of(), inputs()
    stats = stats_of(x, x)
    assert torch.equal(solve("gptaq", weight, INT3, stats).codes, solve("gptq", weight, INT3, stats).codes)


def test_a_chain_aims_where_its_first_step_aims():
    original = inputs()
    x = original + 0.1 * inputs(seed=9)
    weight, stats = weight_of(), stats_of(x, original)
    wanted = original @ weight.T
    errors = [
        float((x @ solve(solver, weight, "int(bits=4, group=32)", stats).decode().T - wanted).square().sum())
        for solver in ("gptq -> refine", "gptaq(share=1.0)", "gptaq(share=1.0) -> refine")
    ]
    assert errors[2] <= errors[1] < errors[0]


def test_a_hessian_for_each_run_of_rows_is_as_many_solves():
    weight = weight_of(32)
    parts = [stats_of(inputs(seed=seed)) for seed in (0, 7)]
    both = Stats(
        second_moment=parts[0].second_moment,
        hessian=torch.stack([part.hessian for part in parts]),
        n_tokens=1024,
        data_hash="",
    )
    found = solve("gptq", weight, INT3, both)
    for run, part in enumerate(parts):
        alone = Stats(second_moment=parts[0].second_moment, hessian=part.hessian, n_tokens=1024, data_hash="")
        rows = slice(16 * run, 16 * run + 16)
        assert torch.equal(found[rows].codes, solve("gptq", weight[rows], INT3, alone).codes)


@pytest.mark.parametrize("solver", ["gptq", "gptaq", "refine", "gptq -> refine"])
def test_hessians_that_cannot_be_inverted_are_damped_and_said(solver):
    weight, x = weight_of(), inputs()
    few = stats_of(x[:20], x[:20])
    dead = x.clone()
    dead[:, 3:9] = 0
    huge = x.clone()
    huge[:, 5] *= 1e6
    for stats, said in ((few, None), (stats_of(dead, dead), "always zero"), (stats_of(huge, huge), None)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = solve(solver, weight, INT3, stats)
        assert bool(torch.isfinite(found.decode()).all())
        assert loss(weight, found, stats.hessian) <= loss(
            weight, solve("rtn", weight, INT3, stats), stats.hessian
        )
        assert said is None or any(said in str(item.message) for item in caught)
    with pytest.warns(PoiseWarning, match="all inputs were zero"):
        found = solve(solver, weight, INT3, stats_of(torch.zeros_like(x), torch.zeros_like(x)))
    assert torch.equal(found.codes, solve("search", weight, INT3, None).codes)
    broken = stats_of(x, x)
    broken.hessian[3, 4] = torch.nan
    with pytest.raises(FormatError, match=r"model\.q: the Hessian of its inputs is not finite"):
        solve(solver, weight, INT3, broken, name="model.q")


def test_an_indefinite_hessian_is_damped_until_it_has_a_factor():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.5
    with pytest.warns(PoiseWarning, match="ill-conditioned"):
        factor = factorize(hessian, damp=0.01)
    assert bool(torch.isfinite(factor.upper).all())


def test_refitted_groups_are_for_scalar_formats():
    weight, stats = weight_of(), stats_of(inputs())
    static = solve("gptq(act_order=False)", weight, INT3, stats)
    refitted = solve("gptq(act_order=False, groups='refit')", weight, INT3, stats)
    assert refitted.params["scale"].shape == static.params["scale"].shape
    assert loss(weight, refitted, stats.hessian) < loss(weight, static, stats.hessian)
    for spec in ("e8", "int(bits=4, group='128x128')"):
        with pytest.raises(FormatError, match="scalar formats"):
            solve("gptq(act_order=False, groups='refit')", weight, spec, stats)
    with pytest.raises(UsageError, match="act_order=False"):
        build("solver", "gptq(groups='refit')")


def test_stochastic_rounding_is_fed_back_too():
    weight, stats = weight_of(64), stats_of(inputs())
    mean = torch.stack(
        [
            solve(f"gptq(rounding='stochastic', seed={seed})", weight, INT3, stats).decode()
            for seed in range(40)
        ]
    ).mean(0)
    nearest = solve("gptq", weight, INT3, stats).decode()
    assert (mean - weight).square().mean() < 0.5 * (nearest - weight).square().mean()


def test_chains_have_specs():
    from poise.core.registry import spec_of

    chain = build("solver", "gptaq(share=0.25) -> refine")
    assert spec_of(chain) == "gptaq(share=0.25) -> refine"
    assert chain.wants == {"second_moment", "hessian", "cross", "drift"}
    assert build("solver", spec_of(chain)) == chain
