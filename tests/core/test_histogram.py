"""Histograms that widen: order and batches leave no trace; figures against all values at hand."""

import numpy as np
import pytest
import torch

from poise.core.distribution import Samples
from poise.core.histogram import Histogram


def values(channels=3, n=5000, seed=0):
    """Channels of different size, with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(channels, n, generator=generator) / torch.rand(channels, n, generator=generator).clamp(
        0.05
    )
    return x * torch.tensor([1e-3, 1.0, 300.0])[:channels, None] + 0.1


def histogram(x, cuts=(), bins=256):
    made = Histogram(len(x), bins)
    for part in torch.tensor_split(x, list(cuts), dim=1):
        made.add(part)
    return made


def same(a, b):
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("counts", "exponent", "low", "high"))


def test_counts_are_those_of_numpy():
    x = values()
    made = histogram(x, cuts=(3, 100, 101))
    assert made.counts.sum(1).tolist() == [5000] * 3
    for channel, counts, exponent in zip(x, made.counts, made.exponent.tolist(), strict=True):
        assert 2.0 ** (exponent - 1) <= channel.abs().max() < 2.0**exponent
        expected, _ = np.histogram(channel.double(), bins=512, range=(-(2.0**exponent), 2.0**exponent))
        assert counts.tolist() == expected.tolist()


def test_order_and_batches_leave_no_trace():
    x = values().sort(dim=1).values  # small values first in the last channel, so that it widens often
    whole = histogram(x)
    assert same(whole, histogram(x.flip(1), cuts=(1, 2, 7, 4000)))
    assert same(whole, histogram(x, cuts=range(1, 5000, 37)))
    zeros = torch.zeros(3, 4)
    assert same(
        histogram(torch.cat((zeros, x), 1), cuts=(4,)), histogram(torch.cat((x, zeros), 1), cuts=(5000,))
    )


def test_merging_is_adding():
    x = values()
    parts = [histogram(x[:, :1000] / 1024), histogram(x[:, 1000:])]
    both = histogram(torch.cat((x[:, :1000] / 1024, x[:, 1000:]), 1))
    for first, second in (parts, parts[::-1]):
        merged = histogram(x[:, :0])
        merged.merge(first)
        merged.merge(second)
        assert same(merged, both)
        assert merged.total == 5000
    assert same(parts[0], histogram(x[:, :1000] / 1024))  # left as it was


def test_powers_of_two_and_zeros_have_their_bin():
    made = histogram(torch.tensor([[4.0, -4.0, 0.0, 1e-40, -1e-40]]), bins=4)
    assert made.exponent.item() == 3
    assert made.counts.tolist() == [[0, 0, 1, 1, 2, 0, 1, 0]]
    assert histogram(torch.zeros(1, 3), bins=4).error(torch.zeros(1), torch.zeros(1), 4).item() < 1e-30


@pytest.mark.parametrize("share", [0.0, 0.001, 0.37, 0.5, 0.9, 0.9995, 1.0])
def test_quantiles_are_numpys_within_a_bin(share):
    x = values()
    made, exact = histogram(x, cuts=(7, 2000)), Samples(x)
    for source, found in ((x, "quantile"), (x.abs(), "quantile_of_size")):
        expected = torch.from_numpy(np.quantile(source.double().numpy(), share, axis=1))
        assert torch.allclose(getattr(exact, found)(share), expected, rtol=1e-6)
        error = (getattr(made, found)(share) - expected).abs()
        assert (error <= made.width).all()
        assert (error <= 2 / 256 * x.abs().amax(1)).all()


@pytest.mark.parametrize(
    ("low", "high", "levels"), [(-2.0, 2.0, 16), (-0.5, 1.25, 4), (0.0, 9.0, 256), (0.3, 0.3, 8)]
)
def test_errors_are_those_of_the_values(low, high, levels):
    x = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(1)) + 0.1
    ends = torch.full((2,), low).double(), torch.full((2,), high).double()
    exact = Samples(x).error(*ends, levels)
    grid = torch.linspace(low, high, levels).double()
    by_hand = (x[:, :500, None].double() - grid).abs().amin(-1).square().mean(1)
    assert torch.allclose(Samples(x[:, :500]).error(*ends, levels), by_hand, rtol=1e-4)
    assert torch.allclose(histogram(x, bins=4096).error(*ends, levels), exact, rtol=2e-3)


def test_the_error_of_a_histogram_is_the_integral_over_its_bins():
    made = histogram(torch.tensor([[0.3, 0.6, -0.9]]), bins=2)
    ends = torch.tensor([-0.7]).double(), torch.tensor([0.8]).double()
    points = (torch.arange(100_000).double() + 0.5) / 200_000
    bins = torch.stack((points, points + 0.5, points - 1)).view(1, -1)  # one value in each of three bins
    expected = Samples(bins).error(*ends, 4)
    assert torch.allclose(made.error(*ends, 4), expected, rtol=1e-6)


def test_a_histogram_wants_a_power_of_two_of_bins():
    with pytest.raises(ValueError, match="power of two"):
        Histogram(1, 100)
