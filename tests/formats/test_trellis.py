"""Trellis codes: the code by hand, Viterbi against all paths, closed streams, and the error that is claimed."""

import struct

import numpy as np
import pytest
import torch

from format_tools import error, solve
from poise.core.errors import FormatError, UsageError
from poise.core.format import QTensor
from poise.core.registry import build, spec_of
from poise.formats._trellis import encode, free_error
from poise.formats.trellis import code_of

SPECS = [
    "trellis(state=8)",
    "trellis(bits=1, state=9)",
    "trellis(bits=3, state=10)",
    "trellis(bits=4, state=8, tile=1, width=64)",
]


def gaussian(rows=37, columns=192, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_specs_have_defaults_and_short_names():
    assert spec_of(build("format", "trellis")) == "trellis"
    assert build("format", "trellis3").bits == 3


@pytest.mark.parametrize("state", [0, 1, 77, 255, 12345, 65535])
def test_the_code_by_hand(state):
    x = (89226354 * state + 64248484) % 2**32
    y = (x & 0x8FFF8FFF) ^ 0x3B603B60
    assert float(code_of(16)[state]) == sum(struct.unpack("<2e", struct.pack("<I", y)))


def test_the_code_is_all_but_gaussian():
    code = code_of(16).double()
    assert abs(code.mean() / code.std()) < 0.01
    assert float((code / code.std()).pow(4).mean()) == pytest.approx(3, abs=0.15)


def paths(bits, state, length, closed):
    """Every path of a small trellis as states, [paths, length]."""
    free = 0 if closed else state - bits
    streams = torch.arange(1 << bits * length + free)
    if closed:
        streams = streams | streams << bits * length  # bits before the first are the last ones
    return torch.stack([streams >> bits * (length - 1 - t) & (1 << state) - 1 for t in range(length)], dim=1)


def small_code(bits, state):
    code = torch.randn(1 << state, generator=torch.Generator().manual_seed(state))
    return code, code.view(-1, 1 << bits).t().contiguous().view(-1).numpy()


@pytest.mark.parametrize(("bits", "state", "length"), [(1, 4, 10), (2, 4, 5), (2, 6, 5), (3, 6, 4)])
def test_a_free_path_is_the_best_of_all(bits, state, length):
    code, by_branch = small_code(bits, state)
    x, w = gaussian(20, length), gaussian(20, length, 1).square()
    every = code[paths(bits, state, length, closed=False)]
    best = torch.stack([(w[i] * (x[i] - every).square()).sum(1).min() for i in range(20)])
    assert torch.allclose(
        torch.from_numpy(free_error(x.numpy(), w.numpy(), by_branch, bits)), best, rtol=1e-5
    )


@pytest.mark.parametrize(("bits", "state", "length"), [(1, 4, 12), (2, 4, 7)])
def test_a_closed_path_is_near_the_best_of_all(bits, state, length):
    code, by_branch = small_code(bits, state)
    x, w = gaussian(200, length), 0.1 + gaussian(200, length, 1).square()
    found = torch.from_numpy(encode(x.numpy(), w.numpy(), by_branch, bits, np.int64(length))).long()
    assert torch.equal(found >> bits, found.roll(1, 1) & (1 << state - bits) - 1)
    every = code[paths(bits, state, length, closed=True)]
    best = torch.stack([(w[i] * (x[i] - every).square()).sum(1).min() for i in range(200)])
    errors = (w * (x - code[found]).square()).sum(1)
    assert (errors >= best * 0.9999).all()
    assert errors.sum() < 1.1 * best.sum()
    assert (errors < best * 1.0001).float().mean() > 0.6


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(37, 192), (1, 192), (16, 64), (0, 192), (13, 0)])
def test_stored_bytes_are_the_claimed_bits_and_survive(spec, shape):
    weight = gaussian(*shape)
    quantized = solve(weight, spec)
    stored = quantized.pack()
    nbytes = sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    assert 8 * nbytes == pytest.approx(quantized.bits_per_weight * max(1, weight.numel()))
    if shape[0] and shape[1]:
        assert quantized.bits_per_weight == quantized.format.bits + 16 / shape[1]
    again = QTensor.unpack(stored, quantized.format, shape[1])
    assert quantized.shape == shape
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.decode(), quantized.decode())


@pytest.mark.parametrize("spec", SPECS)
def test_slabs_round_as_the_whole(spec):
    weight, importance = gaussian(), 0.1 + gaussian(1)[0].abs()
    importance[16:32] = 0  # as if equal
    quantized = solve(weight, spec, importance)
    form = quantized.format
    parts = [
        form.round(
            weight[:, start : start + 64],
            form.at(quantized.params, slice(start, start + 64)),
            importance[start : start + 64],
        )
        for start in range(0, 192, 64)
    ]
    assert torch.equal(torch.cat(parts, dim=1), quantized.codes)
    tiles = [slice(0, 16), slice(16, 37)]
    params = [{"scale": quantized.params["scale"][tile]} for tile in tiles]
    rows = [form.round(weight[t], p, importance) for t, p in zip(tiles, params, strict=True)]
    assert torch.equal(torch.cat(rows), quantized.codes)


@pytest.mark.parametrize("spec", SPECS)
def test_invariances(spec):
    weight = gaussian()
    quantized = solve(weight, spec)
    decoded = quantized.decode()
    assert torch.equal(solve(4 * weight, spec).decode(), 4 * decoded)
    assert torch.equal(quantized[3:7].decode(), decoded[3:7])
    assert torch.equal(quantized.format.round(decoded, quantized.params), quantized.codes)
    assert torch.equal(solve(weight, spec, torch.full((192,), 0.37)).decode(), decoded)
    assert torch.equal(solve(weight, spec, torch.zeros(192)).decode(), decoded)


@pytest.mark.parametrize("spec", SPECS)
def test_importance_moves_the_error_to_other_columns(spec):
    weight, importance = gaussian(), torch.tensor([1.0, 20.0]).repeat(96)
    plain, weighted = ((solve(weight, spec, w).decode() - weight).square() for w in (None, importance))
    assert (weighted * importance).sum() < 0.8 * (plain * importance).sum()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [0.0, 1e-5, 1e-9, 1e-42])
def test_zeros_and_tiny_weights_stay_finite(spec, size):
    weight = size * gaussian()
    weight[3] = 0
    decoded = solve(weight, spec).decode()
    assert decoded.isfinite().all()
    assert not decoded[3].any()
    assert (decoded - weight).norm() <= weight.norm()


def test_huge_weights_need_another_dtype():
    weight = 1e37 * gaussian(16, 64)
    with pytest.raises(FormatError, match=r"w: .*use scale='bfloat16'"):
        solve(weight, "trellis(state=8)", name="w")
    decoded = solve(weight, "trellis(state=8, scale='bfloat16')").decode()
    assert ((decoded - weight) / 1e37).square().mean() < 0.12


def test_rows_of_a_tile_are_not_stored_apart():
    quantized = solve(gaussian(), "trellis(state=8)")
    assert quantized[16:32].pack()["packed"].shape[0] == 16
    with pytest.raises(UsageError, match="tiles of 16, which were taken apart"):
        quantized[3:7].pack()


@pytest.mark.parametrize(
    "spec",
    [
        "trellis(bits=0)",
        "trellis(bits=5)",
        "trellis(state=7)",
        "trellis(state=17)",
        "trellis(tile=0)",
        "trellis(width=6)",
        "trellis(scale='int8')",
    ],
)
def test_nonsense_is_refused_when_built(spec):
    with pytest.raises(UsageError):
        build("format", spec)


def test_noise_and_odd_widths_are_refused():
    quantized = solve(gaussian(16, 32), "trellis(state=8)")
    with pytest.raises(UsageError, match="stochastic"):
        quantized.format.round(gaussian(16, 32), quantized.params, noise=torch.zeros(16, 32))
    with pytest.raises(FormatError, match="rows of 30 are not a multiple of the block of 16 of trellis"):
        solve(gaussian(16, 30), "trellis")


@pytest.mark.parametrize(
    ("spec", "columns", "expected"),
    [
        ("trellis", 256, 0.0713),
        ("trellis(state=10)", 1024, 0.0778),
        ("trellis(bits=1, state=10)", 1024, 0.294),
        ("trellis(bits=3, state=10)", 1024, 0.0215),
        ("trellis(bits=4, state=10)", 1024, 0.00616),
    ],
)
def test_expected_error_on_gaussian_weights(spec, columns, expected):
    assert error(gaussian(32, columns), spec) == pytest.approx(expected, rel=0.04)


def test_more_states_mean_less_error():
    weight = gaussian(32, 256)
    errors = [error(weight, f"trellis(state={state})") for state in (8, 10, 12)]
    assert errors == sorted(errors, reverse=True)


def test_scales_suit_weights_that_are_not_gaussian():
    weight = gaussian(32, 512) / gaussian(32, 512, 1).abs().clamp(min=0.3)
    form = build("format", "trellis(state=10)")
    fitted = form.fit(weight)
    plain = weight.square().mean(1, keepdim=True).sqrt() / code_of(10).square().mean().sqrt()

    def squared(scale):
        params = {"scale": scale.half()}
        return (form.decode(form.round(weight, params), params) - weight).square().sum()

    assert squared(fitted["scale"]) <= 1.01 * min(squared(ratio * plain) for ratio in (0.8, 1.0, 1.2, 1.4))
