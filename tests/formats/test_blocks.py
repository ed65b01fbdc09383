"""Stock blocks of llama.cpp: bit for bit what its decoder and the gguf package read, and better than what it writes."""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from poise.core.errors import FormatError
from poise.core.format import QTensor
from poise.core.registry import build
from poise.core.stats import Stats
from poise.layouts.gguf_blocks import STOCK
from poise.layouts.gguf_header import type_number, type_size

NEEDS_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_s", "iq2_xs", "iq2_xxs")
NOT_IN_GGUF = ("q1_0", "q2_0")
"""Blocks that the gguf package does not decode."""


@pytest.fixture(scope="module")
def ggml():
    """llama.cpp's own encoders and decoders, out of the engine's library."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("needs xllamacpp")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def engine_decode(ggml, name, blocks, columns):
    """Float32 [rows, columns] as llama.cpp decodes uint8 blocks [rows, bytes]."""
    raw = np.ascontiguousarray(blocks)
    out = np.zeros((len(raw), columns), dtype=np.float32)
    decoder = getattr(ggml, f"dequantize_row_{name.replace('_k', '_K')}")
    decoder(ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))
    return out


def engine_encode(ggml, name, weight, importance=None):
    block, nbytes = type_size(name.upper())
    rows, columns = weight.shape
    out = np.zeros((rows, columns // block * nbytes), dtype=np.uint8)
    if importance is None and name in NEEDS_IMPORTANCE:
        importance = torch.ones(columns)
    given = None if importance is None else importance.data_ptr()
    ggml.ggml_quantize_chunk(
        type_number(name.upper()), weight.data_ptr(), out.ctypes.data, 0, rows, columns, given
    )
    return out


def random_blocks(name, rows=48, count=3, seed=0):
    """Any bytes at all."""
    nbytes = build("format", name).nbytes
    return np.random.default_rng(seed).integers(0, 256, (rows, count * nbytes), dtype=np.uint8)


def decode(name, blocks):
    format = build("format", name)
    columns = blocks.shape[1] // format.nbytes * format.columns
    return QTensor.unpack({"blocks": torch.from_numpy(blocks)}, format, columns)


@pytest.mark.parametrize("name", STOCK)
def test_a_block_has_the_size_that_ggml_gives_it(name):
    format = build("format", name)
    assert (format.columns, format.nbytes) == type_size(name.upper())
    assert format.bits_per_weight(8, 512) == 8 * format.nbytes / format.columns


@pytest.mark.parametrize("name", STOCK)
def test_random_bytes_decode_to_the_floats_of_llama_cpp(name, ggml):
    blocks = random_blocks(name)
    decoded = decode(name, blocks).decode().numpy()
    assert np.array_equal(decoded, engine_decode(ggml, name, blocks, decoded.shape[1]), equal_nan=True)


@pytest.mark.parametrize("name", [name for name in STOCK if name not in NOT_IN_GGUF])
def test_random_bytes_decode_to_the_floats_of_the_gguf_package(name):
    blocks = random_blocks(name)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(decode(name, blocks).decode().numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in STOCK if name != "tq1_0"])
def test_any_bytes_are_packed_again_as_they_were(name):
    blocks = random_blocks(name, seed=1)
    assert np.array_equal(decode(name, blocks).pack()["blocks"].numpy(), blocks)


@pytest.mark.parametrize("name", STOCK)
def test_what_is_written_is_what_llama_cpp_reads(name, ggml):
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(2))
    quantized = build("solver", "search").solve(weight, build("format", name))
    blocks = quantized.pack()["blocks"].numpy()
    assert np.array_equal(engine_decode(ggml, name, blocks, 512), quantized.decode().numpy())
    again = decode(name, blocks)
    assert torch.equal(again.codes, quantized.codes)


def test_one_q1_0_block_by_hand():
    """d = 0.5; the first byte has bits 0 and 7, all others are clear."""
    block = np.array([[0x00, 0x38, 0x81, *[0] * 15]], dtype=np.uint8)
    decoded = decode("q1_0", block).decode()[0]
    assert decoded[:8].tolist() == [0.5, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5, 0.5]
    assert (decoded[8:] == -0.5).all()


def test_one_q2_0_block_by_hand():
    """d = 2; the first byte has codes 0, 1, 2, 3 from its lowest bits up, all others are 0."""
    block = np.array([[0x00, 0x40, 0b11_10_01_00, *[0] * 15]], dtype=np.uint8)
    decoded = decode("q2_0", block).decode()[0]
    assert decoded[:4].tolist() == [-2, 0, 2, 4]
    assert (decoded[4:] == -2).all()


def test_one_q4_k_block_by_hand():
    """Scales 1..8 and minima 11..18 of six bits; the codes of group g are all g."""
    weight = decode("q4_k", np.zeros((1, 144), dtype=np.uint8))
    params = {
        "d": torch.tensor([[0.5]]).half(),
        "dmin": torch.tensor([[0.25]]).half(),
        "scale": torch.arange(1, 9, dtype=torch.uint8)[None],
        "minimum": torch.arange(11, 19, dtype=torch.uint8)[None],
    }
    codes = torch.arange(8, dtype=torch.uint8).repeat_interleave(32)[None]
    packed = weight.format.pack(codes, params)["blocks"][0].tolist()
    assert packed[:4] == [0x00, 0x38, 0x00, 0x34]
    # The first four in the low bits; above the minima's the fifth bit of 16, 17, 18; low parts of the last four in pairs.
    assert packed[4:16] == [1, 2, 3, 4, 11, 12 | 64, 13 | 64, 14 | 64, 5 | 15 << 4, 6, 7 | 1 << 4, 8 | 2 << 4]
    assert packed[16:144:32] == [0x10, 0x32, 0x54, 0x76]
    expected = [0.5 * (g + 1) * g - 0.25 * (g + 11) for g in range(8)]
    assert weight.format.decode(codes, params)[0, ::32].tolist() == expected


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", STOCK)
def test_the_error_is_not_above_llama_cpp_s_own(name, weighted, ggml):
    """At the same bytes, with the same importance (its weighted search where it has one)."""
    weight = torch.randn(16, 1024, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    importance = torch.rand(1024, generator=generator) ** 3 + 1e-3 if weighted else torch.ones(1024)
    stats = Stats(second_moment=importance, n_tokens=1, data_hash="")
    ours = build("solver", "search").solve(weight, build("format", name), stats).decode()
    theirs = torch.from_numpy(engine_decode(ggml, name, engine_encode(ggml, name, weight, importance), 1024))
    errors = [float(((decoded - weight).square() * importance).sum()) for decoded in (ours, theirs)]
    assert errors[0] <= errors[1] * (1 + 1e-5)  # one-bit signs are at their optimum in both


@pytest.mark.parametrize("name", STOCK)
def test_huge_weights_are_refused_and_tiny_ones_survive(name):
    format, solver = build("format", name), build("solver", "search")
    with pytest.raises(FormatError, match=r"w: .*float16"):
        solver.solve(torch.full((1, 256), 1e30) * torch.tensor([1.0, -1.0]).repeat(128), format, name="w")
    for size in (1e-12, 1e-40):
        assert torch.isfinite(solver.solve(torch.randn(1, 256) * size, format).decode()).all()


def test_a_width_that_does_not_divide_names_what_fits():
    with pytest.raises(
        FormatError, match=r"rows of 576 are not a multiple of the block of 256 of q4_k; .*q4_0"
    ):
        build("solver", "rtn").solve(torch.randn(2, 576), build("format", "q4_k"), name="w")


SCALAR = [name for name in STOCK if build("format", name).width == 1]


@pytest.mark.parametrize("name", SCALAR)
def test_codes_are_those_of_the_nearest_values(name):
    """Every code is tried for every weight."""
    format = build("format", name)
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(5))
    params = format.fit(weight)
    count = 3 if name in ("tq1_0", "tq2_0") else 1 << format.bits
    every = [format.decode(torch.full(weight.shape, code).to(torch.uint8), params) for code in range(count)]
    least = torch.stack([(values - weight).abs() for values in every]).amin(0)
    difference = (format.decode(format.round(weight, params), params) - weight).abs()
    assert torch.allclose(difference, least, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("name", SCALAR)
def test_only_ratios_of_importance_count(name, factor):
    format, solver = build("format", name), build("solver", "search")
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(6))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(7)) + 0.01
    errors = []
    for given in (importance, importance * factor):
        stats = Stats(second_moment=given, n_tokens=1, data_hash="")
        decoded = solver.solve(weight, format, stats).decode()
        errors.append(float(((decoded - weight).square() * importance).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=5e-3)


@pytest.mark.parametrize("name", [name for name in SCALAR if build("format", name).group < 64])
def test_columns_of_a_group_without_importance_weigh_equally(name):
    format, solver = build("format", name), build("solver", "search")
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(8))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(9)) + 0.1
    importance[64:96] = 0
    stats = Stats(second_moment=importance, n_tokens=1, data_hash="")
    without, equal = (solver.solve(weight, format, given).decode() for given in (stats, None))
    errors = [float((decoded - weight)[:, 64:96].square().sum()) for decoded in (without, equal)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("name", SCALAR)
def test_scales_with_few_digits_in_float16_are_the_best_that_there_are(name):
    """Below 2^-14 they are multiples of 2^-24: coarse, but never worse than a weight of zeros."""
    format, solver = build("format", name), build("solver", "search")
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(10))
    normal = float((solver.solve(weight, format).decode() - weight).square().sum())
    gap = max(np.diff(getattr(format, "levels", (0, 1))))
    for size in (3e-5, 1e-6, 1e-7, 1e-8, 1e-9):
        small = (weight * size).double()
        error = float((solver.solve(weight * size, format).decode() - small).square().sum())
        coarse = 1.5 * normal * size**2 + (gap * 2.0**-24) ** 2 * weight.numel()
        assert error <= min(coarse, float(small.square().sum()) * 1.0001), size
