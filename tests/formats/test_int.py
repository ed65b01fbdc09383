"""The integer grid: closed forms, invariances, bytes, and hostile tensors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import FormatError, UsageError
from poise.core.format import QTensor
from poise.core.registry import build, spec_of
from poise.formats.int import Int

GRIDS = [
    Int(bits=bits, group=group, symmetric=symmetric, zero=zero, scale=scale)
    for bits, group, (symmetric, zero), scale in itertools.product(
        range(1, 9),
        (16, 64, "channel", "tensor"),
        ((True, "integer"), (False, "integer"), (False, "minimum")),
        ("float16", "float32"),
    )
]


def rtn(weight, grid):
    return build("solver", "rtn").solve(weight, grid)


def relative_error(weight, grid):
    return float((rtn(weight, grid).decode() - weight).square().sum() / weight.square().sum())


def test_one_group_by_hand():
    weight = torch.tensor([[0.8, -0.35, 0.1, 0.0] + [0.0] * 12])
    codes, params = (quantized := rtn(weight, Int(bits=4, group=16, scale="float32"))).codes, quantized.params
    assert torch.allclose(params["scale"], torch.tensor([[-0.1]]))
    assert codes[0, :4].tolist() == [-8, 4, -1, 0]  # 3.5 rounds to the even 4
    assert torch.allclose(quantized.decode()[0, :3], torch.tensor([0.8, -0.4, 0.1]))


def test_asymmetric_group_by_hand():
    weight = torch.tensor([[-1.0, 2.0, 0.5, 0.0] + [0.0] * 12])
    quantized = rtn(weight, Int(bits=2, group=16, symmetric=False, scale="float32"))
    assert float(quantized.params["scale"]) == 1.0
    assert int(quantized.params["zero"]) == 1
    assert quantized.codes[0, :4].tolist() == [0, 3, 1, 1]  # 0.5 rounds to the even 0, plus the zero point


@pytest.mark.parametrize("grid", GRIDS, ids=spec_of)
def test_stored_bytes_are_the_claimed_bits_and_survive(grid):
    weight = torch.randn(24, 100, generator=torch.Generator().manual_seed(1))
    quantized = rtn(weight, grid)
    stored = quantized.pack()
    nbytes = sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    assert 8 * nbytes == pytest.approx(quantized.bits_per_weight * weight.numel())
    again = QTensor.unpack(stored, grid, 100)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.decode(), quantized.decode())


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits > 1], ids=spec_of)
def test_decoded_weights_encode_to_themselves(grid):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    quantized = rtn(weight, grid)
    again = grid.round(quantized.decode(), quantized.params)
    assert torch.equal(again, quantized.codes)


@pytest.mark.parametrize("grid", GRIDS, ids=spec_of)
@pytest.mark.parametrize("solver", ["rtn", "search"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.75, 3.0e-5])
def test_constant_tensors_are_exact(grid, solver, value):
    weight = torch.full((4, 40), torch.tensor(value).half().item())
    decoded = build("solver", solver).solve(weight, grid).decode()
    # A symmetric scale is the constant over a power of two: exact unless float16 underflows.
    if not (grid.symmetric and grid.scale == "float16" and abs(value) < 1e-4):
        assert torch.equal(decoded, weight)
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.scale == "float32"], ids=spec_of)
def test_scaling_by_a_power_of_two_scales_the_result(grid):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    first, second = rtn(weight, grid), rtn(weight * 4, grid)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.decode() * 4, second.decode())


@pytest.mark.parametrize(
    "grid", [g for g in GRIDS if g.group != "tensor" and g.scale == "float16"], ids=spec_of
)
def test_rows_do_not_influence_each_other(grid):
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(4))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    assert torch.equal(rtn(weight, grid).decode()[order], rtn(weight[order], grid).decode())


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_or_smaller_groups_mean_less_error(symmetric):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(6))
    by_bits = [relative_error(weight, Int(bits=b, group=64, symmetric=symmetric)) for b in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_group = [
        relative_error(weight, Int(bits=4, group=g, symmetric=symmetric)) for g in (16, 32, 64, 128, 256)
    ]
    assert by_group == sorted(by_group)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("int(bits=4, group=32, scale='float16')", 0.00737),
        ("int(bits=4, group=64, symmetric=False, scale='float16')", 0.00829),
        ("int(bits=4, group=32, symmetric=False, zero='minimum', scale='float16')", 0.00612),
        ("int(bits=8, group='channel', scale='float16')", 7.37e-5),
    ],
)
def test_expected_error_on_gaussian_weights(spec, expected):
    weight = torch.randn(512, 4096, generator=torch.Generator().manual_seed(7))
    assert relative_error(weight, build("format", spec)) == pytest.approx(expected, rel=0.06)


def test_a_last_shorter_group_has_its_own_scale():
    weight = torch.cat((torch.ones(2, 64), torch.full((2, 10), 100.0)), dim=1)
    quantized = rtn(weight, Int(bits=4, group=64, scale="float32"))
    assert quantized.params["scale"].shape == (2, 2)
    assert torch.equal(quantized.decode(), weight)


@pytest.mark.parametrize("grid", GRIDS[::7], ids=spec_of)
@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (1, 1), (1, 17)])
def test_empty_and_tiny_matrices(grid, shape):
    weight = torch.randn(shape)
    for solver in ("rtn", "search"):
        quantized = build("solver", solver).solve(weight, grid)
        assert quantized.decode().shape == shape
        stored = quantized.pack()
        assert QTensor.unpack(stored, grid, shape[1]).decode().shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("solver", ["rtn", "search"])
def test_weights_that_are_not_finite_are_refused_by_name(bad, solver):
    weight = torch.ones(4, 32)
    weight[2, 5] = bad
    with pytest.raises(FormatError, match=r"model\.layers\.3\.up.*NaN or infinite"):
        build("solver", solver).solve(weight, Int(bits=4, group=32), name="model.layers.3.up")


def test_a_scale_that_overflows_says_what_to_use():
    with pytest.raises(FormatError, match=r"w: .*float16.*use scale='bfloat16'"):
        build("solver", "rtn").solve(
            torch.full((2, 32), 3.0e38), Int(bits=2, group=32, scale="float16"), name="w"
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 0},
        {"bits": 9},
        {"group": 8},
        {"group": 512},
        {"group": "row"},
        {"zero": "half"},
        {"scale": "int8"},
        {"symmetric": True, "zero": "minimum"},
    ],
)
def test_nonsense_is_refused_when_built(arguments):
    with pytest.raises(UsageError):
        Int(**{"bits": 4, "group": 32, **arguments})


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 2**31),
    st.floats(1e-6, 1e4),
)
def test_error_is_at_most_half_a_step_inside_the_range(bits, rows, columns, symmetric, seed, size):
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    grid = Int(bits=bits, group=32, symmetric=symmetric, scale="float32")
    quantized = rtn(weight, grid)
    step = quantized.params["scale"].abs().repeat_interleave(32, 1)[:, :columns]
    inside = (quantized.codes > grid.lowest) & (quantized.codes < grid.highest)
    error = (quantized.decode() - weight).abs()
    assert (error[inside] <= 0.5001 * step[inside] + 1e-30).all()
