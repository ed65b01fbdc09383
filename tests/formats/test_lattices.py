"""Lattice blocks and E8P: llama.cpp's own floats, the true nearest point, its encoder's error beaten, invariances."""

import ctypes
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from poise.core.errors import FormatError, UsageError
from poise.core.format import QTensor
from poise.core.registry import build
from poise.core.stats import Stats
from poise.tables import lattices

BLOCKS = ["iq1_m", "iq1_s", "iq2_s", "iq2_xs", "iq2_xxs", "iq3_s", "iq3_xxs"]
ALL = [*BLOCKS, "e8(scale='float16')", "e8(group=32, scale='float16')"]


def random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def uneven(columns, seed=1):
    """Importance over four decades."""
    return 10 ** (4 * torch.rand(columns, generator=torch.Generator().manual_seed(seed)) - 2)


def solve(weight, format, importance=None):
    stats = None
    if importance is not None:
        stats = Stats(second_moment=importance, n_tokens=1, data_hash="")
    return build("solver", "search").solve(weight, format, stats)


def relative_error(weight, decoded, importance=None):
    scale = 1.0 if importance is None else importance
    return float(((weight - decoded).square() * scale).sum() / (weight.square() * scale).sum())


def engine():
    """llama.cpp's library, or the test is skipped."""
    package = pytest.importorskip("xllamacpp")
    return ctypes.CDLL(str(Path(package.__file__).with_name("xllamacpp.abi3.so")))


def engine_decodes(name, blocks, columns):
    values = np.empty((len(blocks), columns), dtype=np.float32)
    decode = getattr(engine(), f"dequantize_row_{name}")
    decode(
        ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(values.size)
    )
    return torch.from_numpy(values)


def engine_encodes(name, weight, importance):
    kind = GGMLQuantizationType[name.upper()]
    rows, columns = weight.shape
    blocks = np.empty((rows, columns // 256 * build("format", name).nbytes), dtype=np.uint8)
    library = engine()
    library.ggml_quantize_init(ctypes.c_int(kind))
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (weight.numpy(), blocks, importance.numpy()))
    source, target, matrix = pointers
    sizes = (ctypes.c_int64(size) for size in (0, rows, columns))
    library.ggml_quantize_chunk(ctypes.c_int(kind), source, target, *sizes, matrix)
    return blocks


def test_tables_are_those_of_gguf():
    for name, table in lattices().items():
        reference = getattr(gguf.quants, "IQ1_S" if name == "iq1" else name.upper())
        reference.init_grid()
        assert np.array_equal(reference.grid.reshape(table.shape), table.numpy())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinite d
@pytest.mark.parametrize("name", BLOCKS)
def test_random_bytes_decode_to_the_floats_of_gguf_and_of_the_engine(name):
    format = build("format", name)
    raw = np.random.default_rng(0).integers(0, 256, (16, 4 * format.nbytes), dtype=np.uint8)
    codes, params = format.unpack({"blocks": torch.from_numpy(raw)}, 1024)
    assert np.array_equal(format.pack(codes, params)["blocks"].numpy(), raw)
    decoded = format.decode(codes, params).numpy()
    reference = gguf.quants.dequantize(raw, GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(decoded, reference)
    np.testing.assert_array_equal(decoded, engine_decodes(name, raw, 1024).numpy())


@pytest.mark.parametrize("spec", ALL)
def test_stored_bytes_are_the_claimed_bits_and_survive(spec):
    format = build("format", spec)
    quantized = solve(random(5, 512), format)
    stored = quantized.pack()
    nbytes = sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    assert 8 * nbytes == pytest.approx(quantized.bits_per_weight * 5 * 512)
    again = QTensor.unpack(stored, format, 512)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.decode(), quantized.decode())


@pytest.mark.parametrize(
    ("name", "engines", "expected", "weighted"),
    [
        ("iq1_m", 0.206, 0.1694, 0.0770),
        ("iq1_s", 0.238, 0.1971, 0.1216),
        ("iq2_s", 0.0623, 0.0567, 0.0253),
        ("iq2_xs", 0.0908, 0.0806, 0.0267),
        ("iq2_xxs", 0.1185, 0.1071, 0.0384),
        ("iq3_s", 0.0189, 0.0167, 0.00575),
        ("iq3_xxs", 0.0333, 0.0310, 0.00725),
    ],
)
def test_expected_error_on_gaussian_weights(name, engines, expected, weighted):
    format, weight, importance = build("format", name), random(48, 4096), uneven(4096)
    error = relative_error(weight, solve(weight, format).decode())
    assert error < engines
    assert error == pytest.approx(expected, rel=0.01)
    error = relative_error(weight, solve(weight, format, importance).decode(), importance)
    assert error == pytest.approx(weighted, rel=0.02)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name < "iq2_xxs" else name for name in BLOCKS]
)
def test_weighted_error_is_below_the_engines_encoder(name):
    """Most of the time is the engine's, which looks up neighbours of every point first."""
    format, weight, importance = build("format", name), random(2, 1024), uneven(1024)
    theirs = engine_decodes(name, engine_encodes(name, weight, importance), 1024)
    ours = solve(weight, format, importance).decode()
    assert relative_error(weight, ours, importance) < relative_error(weight, theirs, importance)


def test_e8_error_on_gaussian_weights():
    weight = random(48, 4096)
    by_group = [
        relative_error(weight, solve(weight, build("format", f"e8(group={group!r})")).decode())
        for group in ("channel", 256, 64, 16)
    ]
    assert by_group[0] == pytest.approx(0.0912, rel=0.005)
    assert by_group == sorted(by_group, reverse=True)


def least_error(format, unit, scale, variant, importance):
    """Least weighted squared error of any code for units [n, width], by trying every one."""
    minus = torch.ones(1, format.width)
    if format.signs:
        minus = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * format.width)
    if format.signs == 2:
        minus = minus[minus.prod(1) > 0]
    count = 1 << format.index_bits
    points = format.points[variant * count : (variant + 1) * count] * scale
    dimensions = points.shape[1]
    total = torch.zeros(len(unit), len(minus))
    for first in range(0, format.width, dimensions):
        part = slice(first, first + dimensions)
        for i, signs in enumerate(minus):
            gap = (unit[:, None, part] * signs[part] - points).square() @ importance[part]
            total[:, i] += gap.amin(1)
    return total.amin(1)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_rounding_finds_the_nearest_point(name, flat):
    format = build("format", name)
    weight = random(12, 256, seed=2) * torch.tensor([0.3, 1.0, 3.0]).repeat(4).unsqueeze(1)
    importance = torch.ones(256) if flat else uneven(format.width).repeat(256 // format.width)
    params = format.fit(random(12, 256))
    codes = format.round(weight, params, importance)
    gap = (format.decode(codes, params) - weight).square() * importance
    errors = gap.view(12, -1, format.width).sum(-1)
    for row in range(0, 12, 3 if name != "iq2_s" else 6):
        group = slice(format.group, 2 * format.group)
        units = weight[row, group].reshape(-1, format.width)
        scale = float(format.scale(params)[row, 1])
        variant = int(params["variant"][row, 1]) if "variant" in params else 0
        least = least_error(format, units, scale, variant, importance[: format.width])
        found = errors[row, group.start // format.width : group.stop // format.width]
        torch.testing.assert_close(found, least, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("flat", [True, False])
def test_e8_rounding_finds_the_nearest_point(flat):
    format, weight = build("format", "e8"), random(4, 64, seed=3)
    importance = torch.ones(64) if flat else uneven(8).repeat(8)
    params = format.fit(weight, importance)
    every = format.decode(torch.arange(1 << 16).view(1, -1), {"scale": torch.ones(1, 1)}).view(-1, 8)
    assert len(every.unique(dim=0)) == 1 << 16
    assert torch.equal((every - 0.25).sum(1) % 2 * ((every + 0.25).sum(1) % 2), torch.zeros(1 << 16))
    decoded = format.decode(format.round(weight, params, importance), params)
    for row in range(4):
        units, w = weight[row].view(-1, 1, 8), importance[:8]
        least = ((units - every * params["scale"][row]).square() @ w).amin(1)
        found = (decoded[row] - weight[row]).square().view(-1, 8) @ w
        torch.testing.assert_close(found, least, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_fitted_scales_are_almost_the_best_of_all(name, flat):
    """Every d of a fine range with every s and variant, rounded exactly, against what ``fit`` found."""
    format, weight = build("format", name), random(1, 256, seed=4)
    importance = None if flat else uneven(256)
    params = format.fit(weight, importance)
    w = torch.ones(256) if flat else importance
    error = float((format.decode(format.round(weight, params, importance), params) - weight).square() @ w)
    d = (params["d"].float() * torch.logspace(-0.35, 0.35, 60, 2)).half().view(-1, 1, 1)
    s = torch.arange(format.top + 1, dtype=torch.uint8).view(1, -1, 1)
    variants = torch.arange(2 if "variant" in params else 1, dtype=torch.uint8).view(1, 1, -1)
    d, s, variants = (part.flatten() for part in torch.broadcast_tensors(d, s, variants))
    tried = {"d": d.view(-1, 1), "s": s.view(-1, 1).expand(-1, 256 // format.group)}
    if "variant" in params:
        tried["variant"] = variants.view(-1, 1).expand(-1, 256 // format.group)
    many = weight.expand(len(d), -1)
    gap = (format.decode(format.round(many, tried, importance), tried) - many).square() * w
    by_group = gap.view(60, -1, 256 // format.group, format.group).sum(-1).amin(1)
    assert error < 1.01 * float(by_group.sum(1).amin())


@pytest.mark.parametrize("spec", ALL)
def test_slabs_of_columns_round_as_the_whole(spec):
    format, weight, importance = build("format", spec), random(6, 1024), uneven(1024)
    params = format.fit(weight, importance)
    codes, group = format.round(weight, params, importance), format.group_of(1024)
    decoded = format.decode(codes, params)
    for length in (format.width, 16, group, 256, 384):
        if length > group and length % group:
            continue
        for start in range(0, 1024 - length + 1, length):
            slab = slice(start, start + length)
            part = format.at(params, slab)
            found = format.round(weight[:, slab], part, importance[slab])
            assert torch.equal(found, codes[:, start // format.width : (start + length) // format.width])
            assert torch.equal(format.decode(found, part), decoded[:, slab])


@pytest.mark.parametrize("spec", ALL)
def test_rows_and_slabs_of_rows_do_not_influence_each_other(spec):
    format, weight = build("format", spec), random(40, 512, seed=5)
    decoded = solve(weight, format).decode()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(6))
    assert torch.equal(solve(weight[order], format).decode(), decoded[order])
    params = format.fit(weight[7:8])
    assert torch.equal(format.decode(format.round(weight[7:8], params), params), decoded[7:8])


@pytest.mark.parametrize("spec", ALL)
def test_decoded_weights_encode_to_themselves(spec):
    format = build("format", spec)
    for spread in (1.0, 1e-3):
        decoded = solve(random(12, 512, seed=7) * spread, format).decode()
        assert torch.equal(solve(decoded, format).decode(), decoded)


@pytest.mark.parametrize("spec", ALL)
def test_scaling_by_a_power_of_two_scales_the_result(spec):
    format, weight = build("format", spec), random(8, 512, seed=8)
    decoded = solve(weight, format).decode()
    for factor in (2.0, 4.0, 0.5):
        assert torch.equal(solve(weight * factor, format).decode(), decoded * factor)


@pytest.mark.parametrize("spec", ALL)
def test_constant_and_zero_blocks(spec):
    format = build("format", spec)
    assert torch.equal(solve(torch.zeros(2, 512), format).decode(), torch.zeros(2, 512))
    for value in (1.0, -0.75, 0.003):
        weight = torch.full((2, 512), value)
        weight[:, 256:] = 0
        if spec == "e8(scale='float16')":
            weight[:] = value  # zeros are not in a lattice that shares a row's scale
        assert relative_error(weight, solve(weight, format).decode()) < 1e-6


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("size", [1e-7, 1e-12, 1e-30, 1e-42])
def test_what_underflows_float16_becomes_the_best_there_is(spec, size):
    weight = random(3, 512) * size
    weight[1] = size
    decoded = solve(weight, build("format", spec)).decode()
    assert torch.isfinite(decoded).all()
    assert (decoded - weight).double().square().sum() <= 1.001 * weight.double().square().sum()


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("size", [1e9, 1e30])
def test_what_overflows_float16_is_refused_with_advice(spec, size):
    with pytest.raises(FormatError, match=r"layer: its range needs a scale of .* use"):
        build("solver", "search").solve(random(3, 512) * size, build("format", spec), name="layer")


@pytest.mark.parametrize("spec", ALL)
def test_importance_that_says_nothing_changes_nothing(spec):
    format, weight = build("format", spec), random(4, 512, seed=9)
    flat = solve(weight, format).decode()
    for equal in (0.3, 1e-20, 0.0):
        assert torch.equal(solve(weight, format, torch.full((512,), equal)).decode(), flat)
    if "e8" not in spec:
        half = torch.cat((torch.zeros(256), uneven(256)))
        assert torch.equal(solve(weight, format, half).decode()[:, :256], flat[:, :256])


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("shape", [(0, 512), (3, 0), (1, 256)])
def test_small_and_empty_tensors(spec, shape):
    quantized = solve(random(*shape), build("format", spec))
    assert quantized.decode().shape == shape
    assert quantized.pack()


@pytest.mark.parametrize("spec", ALL)
def test_chance_is_refused(spec):
    format, weight = build("format", spec), random(1, 256)
    with pytest.raises(UsageError, match="not scalar"):
        format.round(weight, format.fit(weight), noise=torch.zeros(1, 256))


@pytest.mark.parametrize("spec", ["e8(group=20)", "e8(group='tensor')", "e8(scale='e8m0')"])
def test_e8_refuses_what_it_cannot_store(spec):
    with pytest.raises(UsageError):
        build("format", spec)
