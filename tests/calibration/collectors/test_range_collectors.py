"""Collectors of ranges: channels, weights, and figures against all values at hand."""

import numpy as np
import pytest
import torch

from poise.core.distribution import Samples
from poise.core.errors import PoiseError
from poise.core.ranges import Range, absmax, mse_range
from poise.core.registry import get

RANGES = ("absmax", "minmax", "percentile", "mse", "entropy")


def collect(name, x, parts=5, **options):
    collector = get("collector", name)(columns=x.shape[1], name="w", **options)
    for part in torch.tensor_split(x, parts):
        collector.add(part)
    return collector.result()


def activations(tokens=20_000, columns=4):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))
    return x * torch.tensor([0.01, 1.0, 8.0, 200.0])[:columns] + torch.tensor([0.0, 1.0, 0.0, 0.0])[:columns]


def test_extremes_are_exact():
    x = activations()
    assert collect("absmax", x)["high"].item() == x.abs().max().item()
    per_channel = collect("minmax", x, axis=1)
    assert torch.equal(per_channel["low"], x.amin(0))
    assert torch.equal(per_channel["high"], x.amax(0))
    assert torch.equal(collect("absmax", x, axis=1)["low"], -x.abs().amax(0))


@pytest.mark.parametrize("percentile", [90.0, 99.9, 100.0])
@pytest.mark.parametrize("axis", [None, 1])
def test_percentiles_are_numpys(percentile, axis):
    x = activations()
    values = x.double().numpy() if axis else x.double().numpy().reshape(-1, 1)
    bound = 2 / (512 if axis else 8192) * np.abs(values).max(0)
    found = collect("percentile", x, axis=axis, percentile=percentile)
    assert (np.abs(found["high"].numpy() - np.percentile(np.abs(values), percentile, axis=0)) <= bound).all()
    assert torch.equal(found["low"], -found["high"])
    found = collect("percentile", x, axis=axis, percentile=percentile, symmetric=False)
    for key, tail in (("low", (100 - percentile) / 2), ("high", (100 + percentile) / 2)):
        assert (np.abs(found[key].numpy() - np.percentile(values, tail, axis=0)) <= bound).all()


@pytest.mark.parametrize("name", RANGES)
def test_a_channel_is_what_it_is_alone(name):
    x = activations()
    options = {"axis": 1, **({} if name in ("absmax", "minmax") else {"bins": 512})}
    together = collect(name, x, **options)
    for column in range(4):
        alone = collect(name, x[:, column : column + 1], **{**options, "axis": None})
        assert together["high"][column] == alone["high"][0]
        assert together["low"][column] == alone["low"][0]


@pytest.mark.parametrize("name", RANGES)
def test_rows_of_a_weight_are_columns_of_its_transpose(name):
    weight = torch.randn(8, 600, generator=torch.Generator().manual_seed(1))
    rows, columns = collect(name, weight, 1, axis=0), collect(name, weight.T.contiguous(), axis=1)
    assert torch.equal(rows["high"], columns["high"])
    assert torch.equal(rows["low"], columns["low"])


def test_rows_do_not_change_their_number():
    collector = get("collector", "absmax")(columns=3, name="w", axis=0)
    collector.add(torch.ones(4, 3))
    with pytest.raises(PoiseError, match="w: ranges of 4 rows, got 5"):
        collector.add(torch.ones(5, 3))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_mse_is_nearly_that_of_all_values(symmetric, bits):
    x = activations()[:, 1:2]
    found = collect("mse", x, bits=bits, symmetric=symmetric)
    exact = mse_range(Samples(x.T), 2**bits, symmetric)
    errors = [
        Samples(x.T).error(low.double(), high.double(), 2**bits)
        for low, high in ((found["low"], found["high"]), exact)
    ]
    assert errors[0] < 1.01 * errors[1]
    full = absmax(Samples(x.T)) if symmetric else Range(Samples(x.T).low, Samples(x.T).high)
    assert errors[0] < Samples(x.T).error(*full, 2**bits)


@pytest.mark.parametrize("name", ["percentile", "mse", "entropy"])
def test_a_planted_outlier_is_cut_off_in_its_channel_alone(name):
    x = activations()[:, :1].repeat(1, 2) * 100
    options = {"axis": 1} if name == "percentile" else {"axis": 1, "bits": 4}
    plain = collect(name, x, **options)
    x[77, 1] = 60.0
    found = collect(name, x, **options)
    assert found["high"][0] == plain["high"][0]
    assert 2 < found["high"][1] < 20
