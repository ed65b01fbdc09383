"""What every format promises, whoever wrote it: each is found in the registry and run through every solver."""

from dataclasses import fields, replace
from functools import cache

import pytest
import torch

from poise.core.errors import FormatError, UsageError
from poise.core.format import QTensor
from poise.core.registry import build, name_of, names
from poise.core.stats import Stats
from poise.planning.grid import EXAMPLES

SPECS = [spec for name in names("format") for spec in EXAMPLES.get(name, (name,))]
SLOW = ("trellis", "binary-lowrank")
"""A few thousand weights a second: smaller samples."""
PINNED: dict[str, float] = {
    "apot": 0.008858,
    "apot(bits=5)": 0.0041,
    "binary": 0.3621,
    "binary-lowrank": 0.9081,
    "binary-residual": 0.308,
    "bof(bits=3)": 0.02748,
    "bof": 0.00652,
    "bof(signed=False)": 0.006645,
    "e8": 0.09164,
    "float(dtype='float16')": 4.289e-08,
    "float(dtype='bfloat16')": 2.779e-06,
    "float(dtype='float32')": 0,
    "fp4": 0.007972,
    "fp6": 0.0007285,
    "fp6(variant='e3m2')": 0.002454,
    "fp8": 0.0006317,
    "fp8(variant='e5m2')": 0.002453,
    "fp8(group='128x128')": 0.00066,
    "int(bits=4, group=32)": 0.006531,
    "int(bits=4, group=32, symmetric=False)": 0.00603,
    "int(bits=4, group=32, symmetric=False, zero='minimum')": 0.004777,
    "int(bits=4, group=128)": 0.009552,
    "int(bits=5, group=32)": 0.001618,
    "int(bits=5, group=32, symmetric=False, zero='minimum')": 0.00112,
    "int(bits=3, group=64)": 0.03094,
    "int(bits=8, group=32)": 2.452e-05,
    "int(bits=8, group='channel')": 5.527e-05,
    "int(bits=8, group='tensor')": 9.541e-05,
    "int(bits=4, group='128x128', narrow=True, scale='e8m0')": 0.02062,
    "int(bits=4, group=64, symmetric=False, scale='double')": 0.007532,
    "int(bits=2, group=64, symmetric=False)": 0.1218,
    "iq1_m": 0.1689,
    "iq1_s": 0.1971,
    "iq2_s": 0.05745,
    "iq2_xs": 0.08215,
    "iq2_xxs": 0.1088,
    "iq3_s": 0.01665,
    "iq3_xxs": 0.03131,
    "iq4_nl": 0.005393,
    "iq4_xs": 0.005468,
    "kmeans(bits=2)": 0.1155,
    "kmeans(bits=3)": 0.03162,
    "kmeans": 0.007548,
    "log2(bits=3)": 0.0401,
    "log2": 0.02876,
    "mxfp4": 0.01251,
    "mxfp6": 0.0008075,
    "mxfp6(variant='e3m2')": 0.002831,
    "mxfp8": 0.0007148,
    "mxfp8(variant='e5m2')": 0.002831,
    "mxint8": 6.783e-05,
    "nf(bits=2)": 0.1321,
    "nf(bits=3)": 0.02917,
    "nf": 0.006855,
    "nf(scale='double')": 0.006863,
    "nf(bits=8)": 3.106e-05,
    "nvfp4": 0.006715,
    "nvfp4(four_over_six=True)": 0.006715,
    "nvfp4(tensor_scale=False)": 0.006669,
    "power(bits=3)": 0.03935,
    "power": 0.008795,
    "power(exponent='tensor')": 0.008793,
    "q1_0": 0.3621,
    "q2_0": 0.1219,
    "q2_k": 0.06826,
    "q3_k": 0.02059,
    "q4_0": 0.006519,
    "q4_1": 0.004777,
    "q4_k": 0.004833,
    "q5_0": 0.001597,
    "q5_1": 0.00112,
    "q5_k": 0.001153,
    "q6_k": 0.0002743,
    "q8_0": 2.339e-05,
    "ternary": 0.1903,
    "ternary(group='tensor')": 0.1909,
    "tq1_0": 0.1896,
    "tq2_0": 0.1896,
    "trellis": 0.07239,
    "vector": 0.07718,
    "vector(dim=8, stages=2)": 0.0418,
}
"""Relative squared error on Gaussian weights, `search` without importance: [32, 512], SLOW ones [16, 256]."""


def sample(spec, seed=0):
    rows, columns = (16, 256) if name_of(build("format", spec)) in SLOW else (32, 512)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def format_of(spec):
    return build("format", spec).resolve("float16")


@cache
def solved(spec, solver="search"):
    return build("solver", solver).solve(sample(spec), format_of(spec))


def relative_error(quantized, weight):
    return float((quantized.decode() - weight).square().sum() / weight.square().sum())


def test_every_format_has_a_pinned_error():
    assert set(PINNED) == set(SPECS)


@pytest.mark.parametrize("spec", SPECS)
def test_the_error_is_the_expected_one(spec):
    assert relative_error(solved(spec), sample(spec)) == pytest.approx(PINNED.get(spec), rel=0.02, abs=2e-9)


@pytest.mark.parametrize("solver", names("solver"))
@pytest.mark.parametrize("spec", SPECS)
def test_every_solver_gives_codes_that_decode_and_are_stored_in_the_claimed_bits(spec, solver):
    weight, quantized = sample(spec), solved(spec, solver)
    decoded = quantized.decode()
    assert decoded.shape == weight.shape == quantized.shape
    assert decoded.dtype == torch.float32
    assert torch.isfinite(decoded).all()
    stored = quantized.pack()
    nbytes = sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    assert 8 * nbytes == pytest.approx(quantized.bits_per_weight * weight.numel())
    again = QTensor.unpack(
        {key: value.contiguous() for key, value in stored.items()}, format_of(spec), weight.shape[1]
    )
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.decode(), decoded)


@pytest.mark.parametrize("spec", SPECS)
def test_search_is_not_worse_than_covering_the_range(spec):
    weight = sample(spec)
    assert relative_error(solved(spec), weight) <= relative_error(solved(spec, "rtn"), weight) * 1.001 + 1e-9


@pytest.mark.parametrize("spec", SPECS)
def test_rows_can_be_taken_apart(spec):
    quantized = solved(spec)
    assert torch.equal(quantized[3:7].decode(), quantized.decode()[3:7])
    order = torch.tensor([5, 1, 1, 9])
    assert torch.equal(quantized[order].decode(), quantized.decode()[order])


@pytest.mark.parametrize("spec", SPECS)
def test_slabs_of_columns_are_rounded_and_decoded_alone(spec):
    format, weight, quantized = format_of(spec), sample(spec), solved(spec)
    whole = format.round(weight, quantized.params)
    assert torch.equal(whole, quantized.codes)
    columns = weight.shape[1]
    step = format.width or columns
    group = min(format.group_of(columns), columns)
    for start, stop in ((0, step), (columns - step, columns), (group - step if group >= step else 0, group)):
        if start % step or stop % step or not start < stop:
            continue
        slab = slice(start, stop)
        params = format.at(quantized.params, slab)
        codes = format.round(weight[:, slab].contiguous(), params)
        assert torch.equal(format.decode(codes, params), quantized.decode()[:, slab]), slab
        if format.width:
            places = slice(start * whole.shape[1] // columns, stop * whole.shape[1] // columns)
            assert torch.equal(codes, whole[:, places])


@pytest.mark.parametrize("spec", SPECS)
def test_slab_size_never_changes_codes(spec, monkeypatch):
    weight, format = sample(spec), format_of(spec)
    monkeypatch.setattr("poise.core.slabs.WEIGHTS", weight.shape[1] * 3)
    again = build("solver", "search").solve(weight, format)
    assert torch.equal(again.codes, solved(spec).codes)
    assert torch.equal(again.decode(), solved(spec).decode())


@pytest.mark.parametrize("spec", SPECS)
def test_rows_in_another_order_give_the_same_rows(spec):
    format, weight = format_of(spec), sample(spec)
    if format.tile_rows != 1:
        pytest.skip("rows share parameters")
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))
    again = build("solver", "search").solve(weight[order].contiguous(), format)
    assert torch.equal(again.decode(), solved(spec).decode()[order])


@pytest.mark.parametrize("spec", SPECS)
def test_importance_of_zero_or_all_equal_is_none(spec):
    format, weight = format_of(spec), sample(spec)
    for value in (0.0, 1.0):
        stats = Stats(second_moment=torch.full((weight.shape[1],), value), n_tokens=1, data_hash="")
        again = build("solver", "search").solve(weight, format, stats)
        assert relative_error(again, weight) == pytest.approx(relative_error(solved(spec), weight), rel=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_importance_moves_error_to_where_it_matters_less(spec):
    format, weight = format_of(spec), sample(spec)
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(2)) ** 4
    stats = Stats(second_moment=importance, n_tokens=1, data_hash="")
    weighted = build("solver", "search").solve(weight, format, stats).decode()
    errors = [
        float(((decoded - weight).square() * importance).sum())
        for decoded in (weighted, solved(spec).decode())
    ]
    assert errors[0] <= errors[1] * 1.0005


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_are_exact_and_constants_are_close(spec):
    format, weight = format_of(spec), sample(spec)
    for solver in names("solver"):
        assert (build("solver", solver).solve(torch.zeros_like(weight), format).decode().abs() < 1e-7).all()
        constant = build("solver", solver).solve(torch.full_like(weight, 0.375), format).decode()
        assert torch.isfinite(constant).all()
    # The levels next to a constant are the constant, but for grids that no scale lays through it everywhere.
    assert (constant - 0.375).abs().max() < 0.375 * 0.75


@pytest.mark.parametrize("size", [1e-42, 1e-20, 1e-7])
@pytest.mark.parametrize("spec", SPECS)
def test_tiny_weights_stay_finite_and_no_larger_than_they_are(spec, size):
    weight = sample(spec)[:16] * size
    decoded = build("solver", "search").solve(weight, format_of(spec)).decode()
    assert torch.isfinite(decoded).all()
    assert decoded.abs().max() <= 4 * weight.abs().max() + 1e-7


@pytest.mark.parametrize("spec", SPECS)
def test_four_times_the_weight_gives_four_times_the_result(spec):
    weight = sample(spec)
    again = build("solver", "search").solve(weight * 4, format_of(spec))
    difference = (again.decode() / 4 - solved(spec).decode()).square().sum()
    assert float(difference / weight.square().sum()) < 0.02 * PINNED.get(spec, 1) + 1e-9


@pytest.mark.parametrize("spec", SPECS)
def test_a_decoded_weight_is_encoded_to_itself(spec):
    decoded = solved(spec).decode()
    again = build("solver", "search").solve(decoded, format_of(spec)).decode()
    # By the same values up to the rounding of scales; formats that learn codebooks or signs come close.
    assert float((again - decoded).square().sum() / decoded.square().sum()) < IDEMPOTENT.get(
        name_of(build("format", spec)), 1e-6
    )


IDEMPOTENT = {
    **{"q2_k": 1e-4, "q4_k": 5e-5, "q5_k": 5e-5, "iq4_xs": 2e-5},  # in a few super-blocks another d is found
    "power": 1e-2,  # the exponent follows from the distribution of the weights
    **{"vector": 0.05, "trellis": 0.008},
}
"""Formats whose search may miss the exact answer, and by how much at most."""


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", SPECS)
def test_weights_that_are_not_finite_are_refused_by_name(spec, bad):
    weight = sample(spec).clone()
    weight[2, 5] = bad
    with pytest.raises(FormatError, match=r"layers\.3\.up.*NaN or infinite"):
        build("solver", "search").solve(weight, format_of(spec), name="layers.3.up")


@pytest.mark.parametrize("spec", SPECS)
def test_a_width_that_does_not_fit_is_refused_with_what_does(spec):
    format = format_of(spec)
    if format.block == 1:
        assert format.misfit(3, 577) is None
        quantized = build("solver", "search").solve(torch.randn(3, 37), format)
        assert quantized.shape == (3, 37)
        assert torch.isfinite(build("solver", "search").solve(torch.randn(4, 1), format).decode()).all()
        return
    with pytest.raises(
        FormatError, match=f"w: rows of {format.block + 1} .* {format.block} of {name_of(format)}; .* fit: "
    ):
        build("solver", "rtn").solve(torch.randn(16, format.block + 1), format, name="w")


@pytest.mark.parametrize("spec", SPECS)
def test_one_row_and_no_rows(spec):
    format, columns = format_of(spec), sample(spec).shape[1]
    for rows in (0, 1):
        if format.tile_rows > 1 and format.misfit(rows, columns):
            continue
        quantized = build("solver", "search").solve(sample(spec)[:rows], format)
        assert quantized.decode().shape == (rows, columns)
        assert quantized.pack()


@pytest.mark.parametrize("spec", SPECS)
def test_stochastic_rounding_is_for_scalar_formats(spec):
    format, weight, params = format_of(spec), sample(spec), solved(spec).params
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
    if format.width != 1:
        with pytest.raises(UsageError, match="not scalar"):
            format.round(weight, params, noise=noise)
        return
    nearest, drawn = solved(spec).decode(), format.decode(format.round(weight, params, noise=noise), params)
    assert (
        relative_error(
            QTensor(codes=format.round(weight, params, noise=noise), params=params, format=format), weight
        )
        < 4 * PINNED.get(spec, 1) + 1e-4
    )
    assert torch.equal(nearest, drawn) == (
        spec == "float(dtype='float32')"
    )  # float32 weights are values of it


FAMILIES = [
    (spec, bits)
    for spec, bits in (("int(bits=4, group=64)", range(2, 9)), ("nf", range(2, 9)), ("bof", range(2, 9)),
                       ("apot", range(3, 8)), ("power", range(2, 9)), ("kmeans", range(2, 7)), ("log2", range(2, 5)))
]  # fmt: skip


@pytest.mark.parametrize(("spec", "bits"), FAMILIES, ids=[spec for spec, _ in FAMILIES])
def test_more_bits_mean_less_error(spec, bits):
    weight, format = sample(spec), format_of(spec)
    assert "bits" in {field.name for field in fields(format)}
    errors = [
        relative_error(build("solver", "search").solve(weight, replace(format, bits=b)), weight) for b in bits
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[-1]
