"""Learned codebooks: against exact k-means, brute force and the Lloyd-Max quantizers of theory."""

import itertools

import pytest
import torch

from format_tools import error, solve
from poise.core.errors import FormatError, UsageError
from poise.core.format import QTensor
from poise.core.registry import build, spec_of

SPECS = [
    "kmeans",
    "kmeans(bits=2, group=48)",
    "kmeans(bits=5, group=64)",
    "vector",
    "vector(dim=8, stages=2)",
    "vector(bits=3, stages=2, beam=16)",
]
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
"""Squared error on a Gaussian of variance one (Max 1960)."""


def gaussian(rows=13, columns=192, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_specs_have_defaults_and_short_names():
    assert spec_of(build("format", "kmeans")) == "kmeans"
    assert build("format", "kmeans3").bits == 3
    assert spec_of(build("format", "vector")) == "vector"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(13, 192), (1, 192), (0, 192), (13, 0)])
def test_stored_bytes_are_the_claimed_bits_and_survive(spec, shape):
    weight = gaussian(*shape)
    quantized = solve(weight, spec)
    stored = quantized.pack()
    nbytes = sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    assert 8 * nbytes == pytest.approx(quantized.bits_per_weight * max(1, weight.numel()))
    again = QTensor.unpack(stored, quantized.format, shape[1])
    assert quantized.shape == shape
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.decode(), quantized.decode())


@pytest.mark.parametrize("spec", SPECS)
def test_slabs_of_columns_round_as_the_whole(spec):
    weight, importance = gaussian(), 0.1 + gaussian(1)[0].abs()
    quantized = solve(weight, spec, importance)
    form, parts = quantized.format, []
    step = 64 if "64" in spec else 96 if "48" in spec else 16
    for start in range(0, 192, step):
        slab = slice(start, start + step)
        params = form.at(quantized.params, slab)
        codes = form.round(weight[:, slab].contiguous(), params, importance[slab])
        parts.append(form.decode(codes, params))
    assert torch.equal(torch.cat(parts, dim=1), quantized.decode())


@pytest.mark.parametrize("spec", SPECS)
def test_equal_or_no_importance_is_none(spec):
    weight = gaussian()
    plain = solve(weight, spec).decode()
    assert torch.equal(plain, solve(weight, spec, torch.full((192,), 0.37)).decode())
    assert torch.equal(plain, solve(weight, spec, torch.zeros(192)).decode())
    half = torch.cat((torch.zeros(96), torch.ones(96)))
    assert solve(weight, spec, half).decode().isfinite().all()


@pytest.mark.parametrize("spec", SPECS)
def test_importance_moves_the_error_to_other_columns(spec):
    weight = gaussian(64)
    importance = torch.tensor([1.0, 50.0]).repeat(96)
    plain, weighted = ((solve(weight, spec, w).decode() - weight).square() for w in (None, importance))
    assert (weighted * importance).sum() < (plain * importance).sum()
    assert weighted.sum() > plain.sum()


@pytest.mark.parametrize("spec", SPECS)
def test_invariances(spec):
    weight = gaussian()
    quantized = solve(weight, spec)
    decoded = quantized.decode()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    assert torch.equal(solve(4 * weight, spec).decode(), 4 * decoded)
    assert torch.equal(solve(weight[order], spec).decode(), decoded[order])
    assert torch.equal(quantized[3:7].decode(), decoded[3:7])
    again = quantized.format.round(decoded, quantized.params)
    assert torch.equal(quantized.format.decode(again, quantized.params), decoded)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [0.0, 1e-5, 1e-9, 1e-42])
def test_zeros_and_tiny_weights_stay_finite(spec, size):
    weight = size * gaussian()
    weight[3] = 0
    decoded = solve(weight, spec).decode()
    assert decoded.isfinite().all()
    assert not decoded[3].any()
    assert (decoded - weight).norm() <= weight.norm()


@pytest.mark.parametrize("spec", SPECS)
def test_huge_weights_need_another_dtype(spec):
    weight = 1e37 * gaussian()
    with pytest.raises(FormatError, match=r"w: .*use scale='bfloat16'"):
        solve(weight, spec, name="w")
    wide = build("format", spec).__class__(scale="bfloat16")
    decoded = build("solver", "search").solve(weight, wide).decode()
    assert ((decoded - weight) / 1e37).square().mean() < 0.2


@pytest.mark.parametrize(
    "spec",
    [
        "kmeans(bits=0)",
        "kmeans(group=8)",
        "kmeans(group='row')",
        "kmeans(scale='int8')",
        "vector(bits=5)",
        "vector(dim=9)",
        "vector(dim=8)",
        "vector(stages=3)",
        "vector(beam=0)",
        "vector(scale='int8')",
    ],
)
def test_nonsense_is_refused_when_built(spec):
    with pytest.raises(UsageError):
        build("format", spec)


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_long_gaussian_rows_reach_lloyd_max(bits):
    weight = gaussian(4, 1 << 16)
    assert error(weight, f"kmeans(bits={bits})") == pytest.approx(LLOYD_MAX[bits], rel=0.02)


def exact_error(x, w, count):
    """Least error of ``count`` levels: dynamic programming over all runs of the sorted values."""
    order = x.argsort()
    x, w = x[order].double(), w[order].double()
    n = len(x)
    mass, moment, energy = (torch.nn.functional.pad(v.cumsum(0), (1, 0)) for v in (w, w * x, w * x * x))
    m, p, e = (v[None, :] - v[:, None] for v in (mass, moment, energy))
    cost = torch.where(torch.ones(n + 1, n + 1).triu(1).bool(), e - p * p / m, torch.inf)
    best = cost[0]
    for _ in range(count - 1):
        best = torch.minimum(best, (best[:, None] + cost).amin(0))
    return float(best[n])


@pytest.mark.parametrize("tails", ["gaussian", "heavy"])
@pytest.mark.parametrize(("bits", "columns"), [(2, 64), (3, 64), (3, 256), (4, 256)])
def test_kmeans_is_near_the_exact_optimum(bits, columns, tails):
    weight, importance = gaussian(24, columns), 0.05 + gaussian(1, columns, 1)[0].square()
    if tails == "heavy":
        weight = weight / gaussian(24, columns, 2).abs().clamp(min=0.1)
    found = (solve(weight, f"kmeans(bits={bits}, scale='float32')", importance).decode() - weight).square()
    best = torch.tensor([exact_error(row, importance, 1 << bits) for row in weight], dtype=torch.float64)
    ratio = (found * importance).double().sum(1) / best
    assert (ratio > 0.9999).all()
    assert ratio.mean() < 1.005
    assert ratio.max() < 1.02


def test_few_different_values_are_exact():
    values = torch.tensor([-3.0, 0.0, 0.5, 7.0]).repeat(24).view(2, 48)
    importance = torch.zeros(48)
    importance[3] = 1
    assert torch.equal(solve(values, "kmeans(bits=2)").decode(), values)
    assert torch.equal(solve(values, "kmeans(bits=2)", importance).decode(), values)
    again = solve(gaussian(), "kmeans(bits=3, group=48)").decode()
    assert torch.equal(solve(again, "kmeans(bits=3, group=48)").decode(), again)


@pytest.mark.parametrize("bits", [1, 4, 5, 8])
def test_scalar_rounding_is_nearest_and_by_chance_unbiased(bits):
    weight = gaussian(2, 400)
    quantized = solve(weight, f"kmeans(bits={bits})")
    levels, form = quantized.params["codebook"].float(), quantized.format
    nearest = (weight.unsqueeze(-1) - levels).abs().amin(-1)
    assert torch.equal((quantized.decode() - weight).abs(), nearest)
    inside = weight.clamp(levels[:, 0, :1], levels[:, 0, -1:])
    draws = [
        form.decode(form.round(weight, quantized.params, None, torch.full((2, 400), u)), quantized.params)
        for u in (torch.arange(400) + 0.5) / 400
    ]
    assert torch.allclose(torch.stack(draws).mean(0), inside, atol=4 / 400)
    assert (torch.stack(draws) == quantized.decode()).any(0).all()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("vector", 0.0995),
        ("vector(bits=4, dim=2)", 0.0083),
        ("vector(dim=8, stages=2)", 0.0925),
        ("vector(bits=1, dim=8)", 0.326),
    ],
)
def test_expected_error_of_vectors_on_gaussian_weights(spec, expected):
    assert error(gaussian(256, 4096), spec) == pytest.approx(expected, rel=0.02)


def test_one_stage_finds_the_nearest_vector():
    weight, importance = gaussian(5, 32), gaussian(1, 32, 1)[0].square()
    importance[4:8] = 0  # as if equal
    quantized = solve(weight, "vector(bits=1)", importance)
    books, form = quantized.params["codebook"].float()[0], quantized.format
    vectors = (weight / quantized.params["scale"].float()).view(5, 8, 1, 4)
    metric = importance.view(8, 1, 4).clone()
    metric[1] = 1
    squared = (metric * (vectors - books).square()).sum(-1)
    chosen = squared.gather(-1, quantized.codes.long())[..., 0]
    assert torch.allclose(chosen, squared.amin(-1), rtol=1e-5)
    with pytest.raises(UsageError, match="stochastic"):
        form.round(weight, quantized.params, noise=torch.zeros(5, 32))


def test_a_beam_as_wide_as_the_codebook_finds_the_nearest_sum():
    weight = gaussian(40, 16)
    quantized = solve(weight, "vector(bits=2, dim=4, stages=2, beam=16)")
    books = quantized.params["codebook"].float()
    pairs = torch.stack([a + b for a, b in itertools.product(books[0], books[1])])
    vectors = (weight / quantized.params["scale"].float()).view(-1, 1, 4)
    least = (vectors - pairs).square().sum(-1).amin(-1)
    chosen = quantized.decode() / quantized.params["scale"].float()
    assert torch.allclose((vectors[:, 0] - chosen.view(-1, 4)).square().sum(-1), least, rtol=1e-4, atol=1e-9)


def test_as_many_codewords_as_vectors_are_all_but_exact():
    weight = gaussian(8, 32)
    assert error(weight, "vector") < 1e-5


def test_rows_that_vectors_do_not_divide_are_refused_by_name():
    with pytest.raises(FormatError, match="rows of 30 are not a multiple of the block of 4 of vector"):
        solve(gaussian(2, 30), "vector")
