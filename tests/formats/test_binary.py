"""Formats of signs: closed forms, brute force over signs, what is stored, and llama.cpp's own blocks."""

import ctypes
import itertools
import math
from pathlib import Path

import pytest
import torch

from format_tools import error, solve
from poise.core.errors import FormatError, PoiseWarning, UsageError
from poise.core.format import QTensor
from poise.core.registry import build, spec_of
from poise.formats._lowrank import Factors, descend, nearest_signs

SCALAR = [
    "binary",
    "binary(group='channel')",
    "binary(group=48, scale='float32')",
    "binary-residual",
    "binary-residual(group=48, share=0.3)",
    "binary-residual(group='channel', share=1)",
]
SPECS = [*SCALAR, "binary-lowrank", "binary-lowrank(bits=1.5)"]


def gaussian(rows=37, columns=192, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def falling(n=192):
    """A matrix whose singular values fall off, plus noise."""
    left, right = (torch.linalg.qr(gaussian(n, n, seed))[0] for seed in (1, 2))
    return (left * torch.arange(1, n + 1) ** -0.7) @ right * 10 + 0.02 * gaussian(n, n, 3)


@pytest.mark.parametrize("name", ["binary", "binary-residual", "binary-lowrank"])
def test_specs_have_defaults(name):
    assert spec_of(build("format", name)) == name


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(37, 192), (1, 192), (17, 50), (0, 192), (13, 0), (1, 1)])
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


@pytest.mark.parametrize("spec", SCALAR)
def test_slabs_of_columns_round_as_the_whole(spec):
    weight, importance = gaussian(columns=384), 0.1 + gaussian(1, 384)[0].abs()
    quantized = solve(weight, spec, importance)
    form, parts = quantized.format, []
    edges = (0, 16, 48, 96, 384) if "48" in spec else (0, 16, 128, 384)
    for slab in itertools.starmap(slice, itertools.pairwise(edges)):
        params = form.at(quantized.params, slab)
        parts.append(form.round(weight[:, slab].contiguous(), params))
    assert torch.equal(torch.cat(parts, dim=1), quantized.codes)


@pytest.mark.parametrize("spec", SPECS)
def test_equal_or_no_importance_is_none(spec):
    weight = gaussian()
    plain = solve(weight, spec).decode()
    assert torch.equal(plain, solve(weight, spec, torch.full((192,), 0.37)).decode())
    assert torch.equal(plain, solve(weight, spec, torch.zeros(192)).decode())
    half = torch.cat((torch.zeros(96), torch.ones(96)))
    assert solve(weight, spec, half).decode().isfinite().all()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "share=1" not in spec])
def test_importance_moves_the_error_to_other_columns(spec):
    weight, importance = gaussian(), torch.tensor([1.0, 20.0]).repeat(96)
    plain, weighted = ((solve(weight, spec, w).decode() - weight).square() for w in (None, importance))
    assert (weighted * importance).sum() < (plain * importance).sum()
    assert weighted.sum() > plain.sum()


@pytest.mark.parametrize("spec", SPECS)
def test_invariances(spec):
    weight = gaussian()
    quantized = solve(weight, spec)
    decoded = quantized.decode()
    assert torch.equal(solve(4 * weight, spec).decode(), 4 * decoded)
    assert torch.allclose(quantized[3:7].decode(), decoded[3:7], atol=1e-6)
    again = quantized.format.round(decoded, quantized.params)
    assert torch.equal(quantized.format.decode(again, quantized.params), decoded)


@pytest.mark.parametrize("spec", SCALAR)
def test_row_order_does_not_matter(spec):
    weight = gaussian()
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    first, second = solve(weight, spec).decode()[order], solve(weight[order], spec).decode()
    assert torch.allclose(first, second, rtol=2e-3)  # sums over rows in another order


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [0.0, 1e-5, 1e-9, 1e-42])
def test_zeros_and_tiny_weights_stay_finite(spec, size):
    weight = size * gaussian()
    weight[3], weight[:, 5] = 0, 0
    decoded = solve(weight, spec).decode()
    assert decoded.isfinite().all()
    assert not decoded[3].any()
    assert (decoded - weight).norm() <= weight.norm()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.75])
def test_constant_tensors_are_all_but_exact(spec, value):
    weight = torch.full((9, 192), value)
    assert torch.allclose(solve(weight, spec).decode(), weight, rtol=1e-3)
    if spec in SCALAR:
        assert torch.equal(solve(weight, spec).decode(), weight)


@pytest.mark.parametrize("name", ["binary", "binary-residual", "binary-lowrank"])
def test_huge_weights_need_another_dtype(name):
    weight = 1e37 * gaussian()
    with pytest.raises(FormatError, match=r"w: .*use scale='bfloat16'"):
        solve(weight, name, name="w")
    decoded = solve(weight, f"{name}(scale='bfloat16')").decode()
    assert ((decoded - weight) / 1e37).square().mean() < 0.85


@pytest.mark.parametrize(
    "spec",
    [
        "binary(group=8)",
        "binary(scale='int8')",
        "binary-residual(group=8)",
        "binary-residual(group='64x64')",
        "binary-residual(share=1.1)",
        "binary-residual(scale='e8m0')",
        "binary-lowrank(bits=0)",
        "binary-lowrank(bits=3)",
        "binary-lowrank(scale='e8m0')",
    ],
)
def test_nonsense_is_refused_when_built(spec):
    with pytest.raises(UsageError):
        build("format", spec)


def test_binary_scales_are_weighted_means():
    weight, importance = gaussian(5, 256), gaussian(1, 256, 1)[0].square()
    found = solve(weight, "binary(scale='float32')", importance).params["scale"]
    parts = (weight.abs() * importance).view(5, 2, 128).sum(-1) / importance.view(2, 128).sum(-1)
    assert torch.allclose(found, parts)
    blocks = solve(weight, "binary(group='3x128', scale='float32')").params["scale"]
    assert torch.allclose(blocks[3:, 1], weight[3:, 128:].abs().mean())
    powers = solve(weight, "binary(scale='e8m0')").params["scale"]
    plain = solve(weight, "binary(scale='float32')").params["scale"]
    assert torch.equal(powers.int() - 127, torch.where(plain > 0.75, 0, -1).int())


@pytest.mark.parametrize("spec", ["binary(group='channel')", "binary-residual(group='channel', share=0)"])
def test_plain_signs_have_their_error_of_theory(spec):
    assert error(gaussian(512, 1024), spec) == pytest.approx(1 - 2 / math.pi, rel=0.01)


def test_binary_is_the_q1_0_of_llama_cpp():
    module = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(str(Path(module.__file__).parent / "xllamacpp.abi3.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    weight = gaussian(4, 512)
    stored, decoded = (ctypes.c_uint8 * (16 * 18))(), torch.empty(4, 512)
    source = ctypes.c_void_p(weight.data_ptr())
    rows, columns, start = (ctypes.c_int64(n) for n in (4, 512, 0))
    assert library.ggml_quantize_chunk(41, source, stored, start, rows, columns, None) == 16 * 18
    library.dequantize_row_q1_0(stored, ctypes.c_void_p(decoded.data_ptr()), ctypes.c_int64(2048))
    assert torch.allclose(solve(weight, "binary").decode(), decoded, rtol=1e-3)


@pytest.mark.parametrize("spec", ["binary(group='channel')", "binary-residual(share=0.4)"])
def test_scalar_rounding_is_nearest_and_by_chance_unbiased(spec):
    weight = gaussian(3, 128)
    quantized = solve(weight, spec)
    form, params = quantized.format, quantized.params
    a = params["scale"].float()
    b = params.get("residual", torch.zeros(1)).float() * params.get("salient", torch.ones(1, 128))
    c = params.get("column", torch.ones(1, 128)).float()
    levels = torch.stack([sign * a * c + other * b * c for sign in (-1, 1) for other in (-1, 1)], dim=-1)
    nearest = (weight.unsqueeze(-1) - levels).abs().amin(-1)
    assert torch.allclose((quantized.decode() - weight).abs(), nearest, atol=1e-6)
    draws = [
        form.decode(form.round(weight, params, None, torch.full((3, 128), u)), params)
        for u in (torch.arange(400) + 0.5) / 400
    ]
    inside = weight.clamp(levels.amin(-1), levels.amax(-1))
    assert torch.allclose(torch.stack(draws).mean(0), inside, atol=4 / 400)


def test_heavy_columns_are_salient():
    weight, importance = gaussian(40, 200), torch.ones(200)
    weight[:, 7] *= 5
    importance[100] = 50
    quantized = solve(weight, "binary-residual(share=0.01, group=64)", importance)
    assert quantized.params["salient"][0].nonzero().flatten().tolist() == [7, 100]
    assert quantized.pack()["second"].shape == (40, 1)


def test_a_second_plane_and_column_scales_pay():
    weight = gaussian(64, 512) * (1 + gaussian(1, 512, 1).abs())
    errors = [error(weight, f"binary-residual(share={share})") for share in (0, 0.1, 0.5, 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.9 * error(weight, "binary")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("binary", 0.361), ("binary-residual", 0.331), ("binary-residual(share=1)", 0.113)],
)
def test_expected_error_on_gaussian_weights(spec, expected):
    assert error(gaussian(512, 1024), spec) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bits", [0.3, 0.55, 0.8, 1, 2])
@pytest.mark.parametrize("shape", [(256, 256), (96, 512), (512, 96)])
def test_lowrank_fills_the_bits_it_is_given(bits, shape):
    stored = build("format", f"binary-lowrank(bits={bits})").bits_per_weight(*shape)
    assert stored <= bits
    assert stored > bits - 2 * sum(shape) / (shape[0] * shape[1])


def test_lowrank_finds_a_product_of_signs():
    draw = torch.Generator().manual_seed(4)
    u, v = (torch.randint(0, 2, (n, 6), generator=draw) * 2.0 - 1 for n in (60, 80))
    h, middle, g = (0.5 + torch.rand(n, generator=draw) for n in (60, 6, 80))
    weight = (u * h[:, None] * middle) @ (v * g[:, None]).T
    bits = (6 * (60 + 80) + 16 * (60 + 80 + 6) + 64) / (60 * 80)
    form = build("format", f"binary-lowrank(bits={bits})")
    assert form.rank_of(60, 80) == 6
    assert error(weight, f"binary-lowrank(bits={bits})") < 0.02


@pytest.mark.parametrize(("bits", "expected"), [(0.3, 0.779), (0.8, 0.471), (1, 0.387), (2, 0.173)])
def test_expected_error_of_lowrank_on_gaussian_weights(bits, expected):
    assert error(gaussian(512, 512), f"binary-lowrank(bits={bits})") == pytest.approx(expected, rel=0.02)


def test_lowrank_beats_plain_signs_where_singular_values_fall():
    weight = falling()
    assert error(weight, "binary-lowrank(bits=1)") < 0.6 * error(weight, "binary(group='channel')")


def test_signs_are_those_that_no_flip_improves_and_near_the_best():
    weight, h, other = gaussian(50, 30), 0.5 + gaussian(50, 1).abs(), gaussian(30, 8, 1)
    found = nearest_signs(weight, h, other)

    def squared(u):
        return (weight - h * (u @ other.t())).square().sum(1)

    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
    best = torch.stack([squared(u.expand(50, 8)) for u in every]).amin(0)
    for r in range(8):
        flipped = found.clone()
        flipped[:, r] *= -1
        assert (squared(flipped) >= squared(found) * 0.9999).all()
    assert squared(found).sum() < 1.15 * best.sum()
    exact = every[torch.arange(50) * 5]
    assert torch.equal(nearest_signs(h * (exact @ other.t()), h, other), exact)


def test_descent_of_lowrank_ends_where_no_sign_and_no_magnitude_leads_lower():
    """Every flip of either side and a step of every magnitude is tried, in float64."""
    dice = torch.Generator().manual_seed(5)
    n, m, rank = 24, 80, 6
    x = torch.randn(300, m, generator=dice) @ torch.randn(m, m, generator=dice)
    hessian, w = x.T @ x / 300 + 0.1 * torch.eye(m), torch.randn(n, m, generator=dice)

    def sides(rows):
        signs = torch.randn(rows, rank, generator=dice).sign()
        return signs, torch.rand(rows, 1, generator=dice) + 0.5

    def objective(f):
        lost = w.double() - (f.u * f.h * f.l).double() @ (f.v * f.g).double().T
        return float(((lost @ hessian.double()) * lost).sum())

    (u, h), (v, g) = sides(n), sides(m)
    found = Factors(u, v, h, torch.ones(rank), g)
    falling = [objective(found)]
    for _ in range(40):
        found = descend(w, found, hessian)
        falling.append(objective(found))
    assert falling == pytest.approx(sorted(falling, reverse=True), rel=1e-4)
    assert falling[-1] < 0.8 * falling[0]
    for key in ("u", "v"):
        for place in range(getattr(found, key).numel()):
            part = getattr(found, key).clone()
            part.view(-1)[place] *= -1
            assert objective(found._replace(**{key: part})) > falling[-1] * (1 - 1e-4), (key, place)
    for key in ("h", "l", "g"):
        for place in range(getattr(found, key).numel()):
            for factor in (0.97, 1.03):
                part = getattr(found, key).clone()
                part.view(-1)[place] *= factor
                assert objective(found._replace(**{key: part})) > falling[-1] * (1 - 1e-4), (key, place)


def test_descent_of_lowrank_without_least_squares_keeps_what_it_has_and_says_so():
    form, weight = build("format", "binary-lowrank").resolve("float16"), gaussian(48, 96)
    params = form.fit(weight)
    codes = form.round(weight, params)
    with pytest.warns(PoiseWarning, match="ended early"):
        found, kept = form.descend(weight, codes, params, -torch.eye(96), 3)
    assert torch.equal(form.decode(found, kept), form.decode(codes, params))
