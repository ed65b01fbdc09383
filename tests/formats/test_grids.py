"""Scalar grids: their levels against independent definitions, and scales against brute force."""

import ml_dtypes
import numpy as np
import pytest
import torch

from poise.core.errors import FormatError, UsageError
from poise.core.registry import build, spec_of
from poise.core.stats import Stats

ELEMENTS = {
    "fp8(group='tensor')": torch.float8_e4m3fn,
    "fp8(group='tensor', variant='e5m2')": torch.float8_e5m2,
    "fp6(group='tensor')": ml_dtypes.float6_e2m3fn,
    "fp6(group='tensor', variant='e3m2')": ml_dtypes.float6_e3m2fn,
    "fp4(group='tensor')": ml_dtypes.float4_e2m1fn,
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8(variant='e5m2')": torch.float8_e5m2,
    "mxfp6": ml_dtypes.float6_e2m3fn,
    "mxfp6(variant='e3m2')": ml_dtypes.float6_e3m2fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
}
"""Grid -> the same type in another library."""

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""QLoRA (Dettmers et al. 2023), appendix E."""


def gaussian(rows=64, columns=1024, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def solve(weight, spec, solver="search", importance=None):
    stats = None if importance is None else Stats(second_moment=importance, n_tokens=1, data_hash="")
    return build("solver", solver).solve(weight, build("format", spec), stats)


def error(weight, spec, solver="search", importance=None):
    squared = (solve(weight, spec, solver, importance).decode().double() - weight).square()
    return float(squared.sum() / weight.double().square().sum())


def cast(values, kind):
    """Values rounded by the other library, and their bit patterns."""
    if isinstance(kind, torch.dtype):
        stored = values.to(kind)
        return stored.float(), stored.view(torch.uint8)
    stored = values.numpy().astype(kind)
    return torch.from_numpy(stored.astype(np.float32)), torch.from_numpy(stored.view(np.uint8).copy())


@pytest.mark.parametrize("spec", ELEMENTS)
def test_every_code_means_what_another_library_says(spec):
    grid, kind = build("format", spec), ELEMENTS[spec]
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    if isinstance(kind, torch.dtype):
        wanted = codes.view(kind).float()
    else:
        wanted = torch.from_numpy(codes.numpy().view(kind).astype(np.float32))
    finite = wanted.isfinite()
    assert finite.sum() > 2**grid.bits - 9
    assert torch.equal(grid.values()[finite], wanted[finite])


@pytest.mark.parametrize("spec", ELEMENTS)
def test_rounding_is_the_other_library_s_cast_also_halfway(spec):
    grid, kind = build("format", spec), ELEMENTS[spec]
    levels = torch.from_numpy(grid.table.levels.values)
    middles = (levels[1:] + levels[:-1]) / 2
    inside = torch.linspace(float(levels[0]), float(levels[-1]), 4000)
    values = torch.cat((levels, middles, torch.nextafter(middles, torch.tensor(9e9)), inside))
    values = values[: len(values) // 32 * 32].view(1, -1)
    scale = (
        torch.full((1, values.shape[1] // 32), 127, dtype=torch.uint8)
        if spec.startswith("mx")
        else torch.ones(1, 1)
    )
    codes = grid.round(values, {"scale": scale})
    wanted, patterns = cast(values, kind)
    assert torch.equal(grid.decode(codes, {"scale": scale}), wanted)
    nonzero = wanted != 0  # minus zero is stored as zero
    assert torch.equal(codes[nonzero], patterns[nonzero])


def test_what_is_beyond_the_grid_goes_to_its_end():
    grid = build("format", "fp8(group='tensor')")
    codes = grid.round(torch.tensor([[1e9, -1e9, 500.0]]), {"scale": torch.ones(1, 1)})
    assert grid.decode(codes, {"scale": torch.ones(1, 1)}).tolist() == [[448.0, -448.0, 448.0]]


def test_powers_of_two_are_the_e8m0_type_of_torch():
    grid = build("format", "mxfp4")
    codes = torch.arange(255, dtype=torch.uint8).view(1, -1)
    ones = torch.full((1, 255 * 32), 2, dtype=torch.uint8)  # the code of 1
    decoded = grid.decode(ones, {"scale": codes})[:, ::32]
    assert torch.equal(decoded, codes.view(torch.float8_e8m0fnu).float())


def test_nf4_is_the_published_table():
    assert torch.allclose(build("format", "nf4").values(), torch.tensor(NF4), atol=3e-7)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_floats_have_zero_and_both_ends(bits):
    values = build("format", f"nf{bits}").values()
    assert len(values) == 2**bits
    assert float(values[0]) == -1
    assert float(values[-1]) == 1
    assert int((values == 0).sum()) == 1
    assert (values.diff() > 0).all()


def test_logarithmic_levels_by_hand():
    values = build("format", "log2(bits=3)").values()
    assert values[:4].tolist() == [0, 1, 0.5, 0.25]
    assert values[5:].tolist() == [-1, -0.5, -0.25]
    assert values[4].isnan()


def test_additive_powers_of_two_by_hand():
    # Two terms of two bits: {0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}.
    sums = sorted({a + b for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2, 1 / 8, 1 / 32)})
    assert torch.allclose(build("format", "apot5").values()[:16], torch.tensor(sums) / 1.5)
    # One of two bits and one of one: {0, 1, 1/2, 1/8} + {0, 1/4}.
    sums = sorted({a + b for a in (0, 1, 1 / 2, 1 / 8) for b in (0, 1 / 4)})
    assert torch.allclose(build("format", "apot4").values()[:8], torch.tensor(sums) / 1.25)


@pytest.mark.parametrize("signed", [True, False])
def test_block_optimal_levels_are_centroids_of_sampled_blocks(signed):
    """Lloyd's condition on blocks that are drawn, not integrated: each free level is the mean of its cell, weighted
    by the squared maximum."""
    levels = build("format", f"bof(bits=4, signed={signed})").values().double()
    blocks = torch.randn(200_000, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    place = blocks.abs().argmax(1, keepdim=True)
    largest = blocks.gather(1, place) if signed else blocks.gather(1, place).abs()
    others = torch.ones_like(blocks, dtype=torch.bool).scatter_(1, place, False)
    u, weight = (blocks / largest)[others], largest.square().expand_as(blocks)[others]
    cell = torch.bucketize(u, (levels[1:] + levels[:-1]) / 2)
    mass, moment = (
        torch.zeros(16, dtype=torch.float64).scatter_add_(0, cell, x) for x in (weight, weight * u)
    )
    free = [i for i in range(16) if float(levels[i]) not in ((0, 1) if signed else (-1, 0, 1))]
    assert len(free) == (14 if signed else 13)
    assert torch.allclose((moment / mass)[free], levels[free], atol=1.5e-3)


def test_block_optimal_is_better_than_quantiles_and_signs_help():
    weight = gaussian(256, 4096)
    nf4, bof4, bof4s = (error(weight, s, "rtn") for s in ("nf4", "bof(signed=False)", "bof4"))
    assert bof4s < bof4 < nf4


@pytest.mark.parametrize(
    "spec", ["nf4", "fp4", "int(bits=3, group=32)", "log2", "ternary(group=64)", "bof3", "power(bits=3)"]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_near_the_best_of_a_dense_scan(spec, weighted):
    weight = gaussian(16, 256)
    grid = build("format", spec)
    importance = (
        torch.rand(256, generator=torch.Generator().manual_seed(2)) ** 3 if weighted else torch.ones(256)
    )
    n = grid.group_of(256)
    params = grid.fit(weight, importance if weighted else None)
    codes = grid.round(weight, params)
    found = ((grid.decode(codes, params) - weight).square() * importance).view(16, -1, n).sum(-1)
    least = torch.full_like(found, torch.inf)
    cover = weight.view(16, -1, n).abs().amax(-1)
    top = max(
        abs(float(grid.decode(codes, {**params, "scale": torch.ones_like(params["scale"])}).abs().max())), 1
    )
    for ratio in torch.linspace(0.1, 1.6, 300):
        for sign in (1, -1):
            tried = {**params, "scale": sign * ratio * cover / top}
            decoded = grid.decode(grid.round(weight, tried), tried)
            squared = ((decoded - weight).square() * importance).view(16, -1, n).sum(-1)
            least = torch.minimum(least, squared)
    assert float(found.sum() / least.sum()) < 1.02


@pytest.mark.parametrize(
    "spec", ["mxfp4", "mxint8", "fp4(scale='e8m0')", "int(bits=4, group=32, scale='e8m0')"]
)
def test_powers_of_two_are_the_best_of_all(spec):
    weight = gaussian(8, 256) * 0.02
    grid = build("format", spec)
    found = (solve(weight, spec).decode() - weight).square().view(8, -1, 32).sum(-1)
    tried = []
    for e in range(100, 140):
        params = {"scale": torch.full((8, 8), e, dtype=torch.uint8)}
        tried.append(
            (grid.decode(grid.round(weight, params), params) - weight).square().view(8, -1, 32).sum(-1)
        )
    assert torch.allclose(found, torch.stack(tried).amin(0), rtol=1e-5)


def test_microscaling_covers_as_the_specification_says():
    weight = torch.zeros(1, 32)
    weight[0, 3] = -7.9  # floor(log2(7.9)) - 2 = 0: clipped to 6
    quantized = solve(weight, "mxfp4", "rtn")
    assert int(quantized.params["scale"]) == 127
    assert float(quantized.decode()[0, 3]) == -6


def test_nvfp4_block_by_hand():
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16], weight[0, 17] = 2688.0, 3.0, 0.5  # 2688 = 6 * 448: the tensor's scale is 1
    quantized = solve(weight, "nvfp4", "rtn")
    assert float(quantized.params["tensor_scale"]) == 1
    assert quantized.params["scale"].tolist() == [[0x7E, 0x30]]  # 448 and 0.5 in E4M3
    assert quantized.codes[0, [0, 16, 17]].tolist() == [7, 7, 2]
    assert torch.equal(quantized.decode(), weight)


def test_four_over_six_is_never_worse_and_takes_both():
    weight = gaussian(64, 512)
    squared = {}
    for spec in ("nvfp4", "nvfp4(four_over_six=True)"):
        squared[spec] = (solve(weight, spec, "rtn").decode() - weight).square().view(64, -1, 16).sum(-1)
    plain, choice = squared.values()
    assert (choice <= plain * (1 + 1e-5)).all()
    assert 0.1 < float((choice < plain).float().mean()) < 0.9


def test_without_a_tensor_scale_small_weights_are_lost_and_with_one_kept():
    weight = gaussian(8, 64) * 1e-3
    assert error(weight, "nvfp4") < 0.01
    assert error(weight, "nvfp4(tensor_scale=False)") > 0.05


def test_ternary_cover_is_absmean_and_search_the_optimum():
    weight = gaussian(8, 4096)
    covered = solve(weight, "ternary", "rtn")
    assert torch.allclose(covered.params["scale"], weight.abs().mean(1, keepdim=True))
    assert torch.equal(
        covered.codes, (weight / covered.params["scale"]).round().clamp(-1, 1).to(torch.uint8) + 1
    )
    assert error(gaussian(64, 4096), "ternary") == pytest.approx(
        0.1902, rel=0.01
    )  # Lloyd-Max of three levels


def test_ternary_packs_five_to_a_byte():
    quantized = solve(gaussian(3, 23), "ternary")
    packed = quantized.pack()["packed"]
    assert packed.shape == (3, 5)
    assert int(packed[0, 0]) == sum(int(q) * 3**k for k, q in enumerate(quantized.codes[0, :5]))
    assert int(packed.max()) < 243


@pytest.mark.parametrize("peak", [1.0, 2.5, 8.0])
def test_power_law_takes_the_exponent_that_theory_gives(peak):
    """For w = u^peak with uniform u the density is w^(1/peak - 1); the best density of levels is its cube root (Panter,
    Dite 1951), which makes the levels a power 1 / (1 - (1 - 1/peak) / 3) of equal steps."""
    uniform = torch.rand(256, 512, generator=torch.Generator().manual_seed(3)) * 2 - 1
    weight = uniform.sign() * uniform.abs() ** peak
    params = build("format", "power(bits=6, group='channel', exponent='tensor')").fit(weight)
    wanted = 1 / (1 - (1 - 1 / peak) / 3)
    assert 1 + int(params["exponent"]) / 32 == pytest.approx(wanted, abs=0.12)


@pytest.mark.parametrize("spec", ["power(bits=4, group=32)", "power(bits=3, exponent='tensor')"])
def test_power_law_decodes_by_its_formula(spec):
    grid = build("format", spec)
    quantized = solve(gaussian(8, 128), spec)
    top = 2 ** (grid.bits - 1) - 1
    q = quantized.codes.double() - top
    power = 1 + quantized.params["exponent"].double() / 32
    scale = quantized.params["scale"].double().repeat_interleave(grid.group_of(128), dim=1)
    assert torch.allclose(quantized.decode().double(), scale * q.sign() * (q.abs() / top) ** power, rtol=1e-6)


@pytest.mark.parametrize(
    "spec", ["nf(group='40x48')", "int(bits=4, group='40x48')", "int(bits=4, group='40x48', symmetric=False)"]
)
@pytest.mark.parametrize("solver", ["rtn", "search"])
def test_blocks_of_rows_and_columns_share_a_scale_also_at_the_edges(spec, solver):
    weight = gaussian(100, 130)
    weight[40:80, 48:96] *= 100
    quantized = solve(weight, spec, solver)
    scale = quantized.params["scale"]
    assert scale.shape == (100, 3)
    assert (scale[:40] == scale[0]).all()
    assert scale[40, 1].abs() > 20 * scale[0, 1].abs()
    assert quantized.pack()["scale"].shape == (3, 3)
    assert error(weight, spec, solver) < 0.05
    # The last block has 20 rows and 34 columns, and is as good as alone.
    corner = weight[80:, 96:].contiguous()
    alone = (solve(corner, spec, solver).decode() - corner).square().sum()
    assert float((quantized.decode()[80:, 96:] - corner).square().sum()) == pytest.approx(
        float(alone), rel=0.02
    )


def test_double_quantization_costs_little_and_is_counted():
    weight = gaussian(16, 64 * 300)
    single, double = "nf4(scale='float32')", "nf4(scale='double')"
    assert error(weight, double, "rtn") < 1.005 * error(weight, single, "rtn")
    # One byte a group of 64, four a run of 256 groups.
    assert build("format", double).bits_per_weight(16, 64 * 300) == pytest.approx(
        4 + 8 / 64 + 2 * 32 / (64 * 300)
    )
    quantized = solve(weight, double)
    assert quantized.params["scale_step"].shape == (16, 2)
    assert torch.equal(quantized.decode()[:, 64 * 290 :], build("format", double).decode(
        quantized.codes[:, 64 * 290 :], build("format", double).at(quantized.params, slice(64 * 290, 64 * 300))
    ))  # fmt: skip


def test_narrow_integers_have_a_mirror_image_for_every_code():
    quantized = solve(gaussian(16, 256), "int(bits=4, group=32, narrow=True)", "rtn")
    assert int(quantized.codes.min()) == -7
    assert int(quantized.codes.max()) == 7
    assert (quantized.params["scale"] > 0).all()


STOCHASTIC = ["int(bits=3, group=64)", "int(bits=4, group=32, symmetric=False)", "nf4", "mxfp4", "fp8", "log2",
              "ternary", "power", "float(dtype='bfloat16')"]  # fmt: skip


@pytest.mark.parametrize("spec", STOCHASTIC)
def test_stochastic_rounding_is_unbiased_between_two_neighbours(spec):
    weight = gaussian(4, 64) * 0.3
    grid = build("format", spec)
    params = grid.cover(weight)
    nearest = grid.decode(grid.round(weight, params), params)
    ends = (
        [grid.decode(grid.round(weight + d, params), params) for d in (-9e3, 9e3)]
        if params
        else [weight - 1, weight + 1]
    )
    inside = (weight > torch.minimum(*ends)) & (weight < torch.maximum(*ends))
    assert inside.float().mean() > 0.5
    total, draws = torch.zeros_like(weight), 2000
    for seed in range(draws):
        noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        drawn = grid.decode(grid.round(weight, params, noise=noise), params)
        total += drawn
    step = (nearest - weight).abs().max() * 2
    spread = float(step) / 2 / draws**0.5
    assert ((total / draws - weight).abs()[inside] < 5 * spread + 1e-6).all()


def test_stochastic_rounding_is_a_choice_of_every_solver_and_seeded():
    weight, grid = gaussian(), build("format", "nf4")
    first, again, other = (
        build("solver", f"rtn(rounding='stochastic', seed={seed})").solve(weight, grid).codes
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, build("solver", "rtn").solve(weight, grid).codes)


def test_chance_depends_on_the_place_and_not_on_slabs(monkeypatch):
    weight, solver = gaussian(), build("solver", "search(rounding='stochastic')")
    whole = solver.solve(weight, build("format", "nf4")).codes
    monkeypatch.setattr("poise.core.slabs.WEIGHTS", 5000)
    assert torch.equal(solver.solve(weight, build("format", "nf4")).codes, whole)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e20])
def test_the_size_of_weights_does_not_matter_to_the_search(size):
    weight = gaussian(8, 256)
    for spec in ("nf4", "int(bits=3, group=64)", "int(bits=3, group=64, symmetric=False)"):
        assert error(weight * size, spec) == pytest.approx(error(weight, spec), rel=0.01)


def test_a_scale_that_overflows_names_the_way_out():
    with pytest.raises(FormatError, match="use scale='bfloat16'"):
        build("solver", "rtn").solve(gaussian() * 1e10, build("format", "nf(scale='float16')"))


@pytest.mark.parametrize(
    "spec",
    ["nf9", "nf1", "log2(bits=9)", "apot(bits=2)", "bof(group='channel')", "power(exponent='row')", "fp8(variant='e3m4')",
     "fp6(variant='e4m1')", "mxfp8(variant='e3m4')", "nf(group=8)", "nf(group='0x16')", "nf(scale='int8')",
     "power(group='16x16')", "int(bits=1, group=32, narrow=True)", "int(bits=4, group=32, symmetric=False, narrow=True)",
     "int(bits=4, group=32, symmetric=False, zero='minimum', scale='double')", "rtn"],
)  # fmt: skip
def test_nonsense_is_refused(spec):
    with pytest.raises(UsageError):
        build("format", spec)


def test_short_names_give_the_bits():
    assert spec_of(build("format", "nf3")) == "nf(bits=3)"
    assert build("format", "int8(group=64)").bits == 8
    assert build("format", "fp8") == build("format", "fp8()")
